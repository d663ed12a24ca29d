"""A resident layer in one call: the same bits as expert by expert, whatever its slots are."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.manifest import SlotRecord
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.experts import find_experts
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.cpu_layer import CpuBackend, CpuLayer
from conmoe_edge.offload.compute.experts_forward import HANDLE, LayerHandle
from conmoe_edge.offload.kernels.cpu.bindings import operator
from conmoe_edge.offload.residency.policies import POLICIES
from tests.families import tiny_model
from tests.hand_packages import identity, predict, slots_of, write_package
from tests.offload.fastpath.single_tokens import steps

ENGINE = operator()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="no compiler here")


def package_of(tmp_path: Path, *, name: str = "olmoe") -> Path:
    """A package whose slots are shared, scaled, dropped and alone."""
    model = tiny_model(name, dtype=torch.bfloat16)

    def slot(layer: int, expert: int) -> SlotRecord:
        own = identity(model)[layer][expert].prototype
        if expert % 4 == 3:
            return SlotRecord(None)
        assert own is not None
        first = identity(model)[layer][expert - expert % 4].prototype
        return SlotRecord(first, 1.0 if expert % 4 == 0 else 0.5)

    return write_package(model, tmp_path, slots_of(model, slot))


def layer_of(model: Any) -> tuple[Any, LayerHandle]:
    _, module = next(iter(find_experts(model).values()))
    return module, getattr(module, HANDLE)


def one_call(handle: LayerHandle, module: Any) -> CpuLayer:
    found = handle.experts(module)
    assert isinstance(found, CpuLayer)
    return found


def by_hand(
    module: Any, handle: LayerHandle, x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """Merged in Python, computed expert by expert, combined."""
    backend = handle.backend
    assert isinstance(backend, CpuBackend)
    known = handle.slots
    merged = known.slot_map.merge(slots[0].tolist(), gates[0].tolist())
    pairs = known.slot_map.gated_constants(slots[0].tolist(), gates[0].tolist())
    constants = [(known.constants[row], gate) for row, gate in pairs]  # type: ignore[index]
    parts = []
    for number in merged:
        experts = backend.residency.resident([number])
        assert experts is not None
        parts.append(backend.arithmetic.one_token(module, experts, x))
    out = torch.cat(parts) if parts else torch.empty(0, x.shape[1])
    return backend.arithmetic.combine(out, list(merged.values()), x.dtype, constants)


@pytest.mark.parametrize("with_constants", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_as_expert_by_expert(
    tmp_path: Path, with_constants: bool, dtype: torch.dtype
) -> None:
    model: Any = load_package(package_of(tmp_path))
    module, handle = layer_of(model)
    width, experts = model.config.hidden_size, len(handle.slots.slot_map)
    if with_constants:
        generator = torch.Generator().manual_seed(5)
        rows = tuple(i if i % 3 else -1 for i in range(experts))
        handle.slots = SlotTensors.of(
            replace(handle.slots.slot_map, constants=rows),
            torch.randn(experts, width, generator=generator),
            torch.device("cpu"),
        )
        handle.use(handle.backend)  # loading has looked at the layer as it was
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, width, generator=generator).to(dtype)
        slots = torch.randperm(experts, generator=generator)[:4].unsqueeze(0)
        if seed == 0:
            slots[0, 1] = experts  # a skip mark
        if seed == 1:
            slots = torch.tensor([[3, 7, 3, 7]])  # nothing but dropped ones
        gates = torch.rand(1, 4, generator=generator).to(dtype)
        whole = one_call(handle, module)
        found = whole.output(x, slots, gates)
        if dtype not in whole.formats:
            assert found is None and dtype == torch.float32
            continue
        assert found is not None
        assert torch.equal(found, by_hand(module, handle, x, slots, gates))


def test_what_was_asked_for_is_counted(tmp_path: Path) -> None:
    model: Any = load_package(package_of(tmp_path))
    module, handle = layer_of(model)
    before = model.conmoe.stats().hits
    slots, gates = torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4).bfloat16()
    x = torch.ones(1, model.config.hidden_size).bfloat16()
    one_call(handle, module).output(x, slots, gates)
    assert model.conmoe.stats().hits - before == 1, "three slots lead to one prototype, one to none"


def test_nothing_is_done_where_a_prototype_is_absent(tmp_path: Path) -> None:
    folder = package_of(tmp_path)
    whole: Any = load_package(folder)
    few: Any = load_package(folder, slots=(2,), cache_policy="lru")
    for model, stays in ((whole, True), (few, False)):
        module, handle = layer_of(model)
        assert one_call(handle, module).stays == stays
    module, handle = layer_of(few)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, few.config.hidden_size, generator=generator).bfloat16()
    gates = torch.rand(1, 2, generator=generator).bfloat16()
    behind = {
        slot: number for slot, number in enumerate(handle.slots.slot_map.targets) if number >= 0
    }
    # The other layers' prototypes push this layer's out.
    others = sorted(set(range(len(few.conmoe.manifest.prototypes))) - set(behind.values()))
    few.conmoe.residency.visit(others[:2], lambda positions, experts: None)
    slots = torch.tensor([[min(behind), max(behind)]])
    asked = few.conmoe.stats()
    one = one_call(handle, module)
    assert one.output(x, slots, gates) is None
    assert few.conmoe.stats() == replace(asked, memory_used=few.conmoe.stats().memory_used)
    wanted = module(x, slots, gates)
    assert few.conmoe.stats().misses == asked.misses + 2
    found = one.output(x, slots, gates)
    assert found is not None and torch.equal(found, wanted)
    assert few.conmoe.stats().hits == asked.hits + 2


def test_a_retreat_leaves_nothing_behind(tmp_path: Path) -> None:
    """The layer's table knows what is there now, and does not hold on to the memory of before."""
    model: Any = load_package(package_of(tmp_path))
    module, handle = layer_of(model)
    before = one_call(handle, module)
    memory = weakref.ref(model.conmoe.residency.pools[0]._memory.untyped_storage())
    assert model.conmoe.retreat()
    gc.collect()
    assert before.stays and not one_call(handle, module).stays
    assert memory() is None


@pytest.mark.parametrize("policy", [None, *POLICIES])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_cache_decides_the_same_in_one_call(
    tmp_path: Path, policy: str | None, ahead: bool
) -> None:
    """Tokens, hits and misses, with what the operator looks up by itself and without."""
    folder = package_of(tmp_path)
    if ahead:
        predict(folder, 1, 0.75)
    tokens = [(3 + 5 * i) % 90 for i in range(40)]
    seen = []
    for looks_up in (True, False):
        model: Any = load_package(folder, slots=(4,), cache_policy=policy)
        assert (model.conmoe.residency.prefetcher is not None) == ahead
        if not looks_up:
            for _, module in find_experts(model).values():
                one_call(getattr(module, HANDLE), module).table = None
        _, cache = steps(model, tokens[:5])  # layers try themselves, which asks the cache once more
        model.conmoe.reset_stats()
        logits, _ = steps(model, tokens[5:], cache)
        stats = model.conmoe.stats()
        seen.append((logits, stats.hits, stats.misses))
        assert stats.hits > 0 and stats.misses > 0
    assert torch.equal(seen[0][0], seen[1][0])
    # Read ahead, what was there depends on how fast the disk was; lfru has counted what was asked in the trials, of
    # which the two ways make different ones.
    if not ahead and policy != "lfru":
        assert seen[0][1:] == seen[1][1:]


def test_a_step_is_the_same_bits_at_any_budget(tmp_path: Path) -> None:
    folder = package_of(tmp_path)
    results = []
    for slots in (None, (1,)):
        model: Any = load_package(folder) if slots is None else load_package(folder, slots=slots)
        with torch.no_grad():
            first = model(torch.tensor([[5, 17, 33]]), use_cache=True)
            step = model(torch.tensor([[9]]), past_key_values=first.past_key_values)
        results.append(step.logits)
    assert torch.equal(*results)


def test_other_gates_are_not_for_it(tmp_path: Path) -> None:
    """Biases and interleaved gates keep their own way."""
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    packed: Any = load_package(write_package(model, tmp_path, identity(model)))
    module, handle = layer_of(packed)
    assert find_experts(model) and one_call(handle, module).table is None


@pytest.mark.parametrize("length", [1, 15, 16, 700])
def test_attention_weights_are_a_softmax_at_any_length(length: int) -> None:
    assert ENGINE is not None
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(1, 4, 1, 32, generator=generator).bfloat16() * 4
    key = torch.randn(1, 2, length, 32, generator=generator).bfloat16() * 4
    value = torch.randn(1, 2, length, 32, generator=generator).bfloat16()
    found = ENGINE.attend(query, key, value, 0.5)
    assert found is not None
    wide = key.double().repeat_interleave(2, 1), value.double().repeat_interleave(2, 1)
    weights = torch.softmax(query.double() @ wide[0].transpose(2, 3) * 0.5, -1)
    wanted = (weights @ wide[1]).transpose(1, 2)
    assert torch.allclose(found.double(), wanted, atol=1e-2, rtol=1e-2)
