"""What a consolidated model computes, against plain transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.experts import expert_forward, find_experts, part_names
from tests.families import tiny_model
from tests.hand_packages import identity, materialise, slots_of, thirds, write_package

MODELS = (
    "olmoe",
    "qwen3_moe",
    "gpt_oss",
)  # plain; with a dense layer; transposed, biased, interleaved gate
IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9, 41, 27, 3, 58, 77, 21, 30, 90, 11, 45, 62, 8]])


def _logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def _greedy(model: Any) -> list[int]:
    return model.generate(IDS, max_new_tokens=12, do_sample=False)[0].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_identity_map_is_transformers(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    packed = load_package(write_package(plain, tmp_path, identity(plain)))
    assert torch.allclose(_logits(packed), _logits(plain), atol=1e-5)
    assert _greedy(packed) == _greedy(plain)


@pytest.mark.parametrize("name", MODELS)
def test_identity_map_in_bf16(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name, dtype=torch.bfloat16)
    packed = load_package(write_package(plain, tmp_path, identity(plain)))
    assert packed.dtype == torch.bfloat16
    assert torch.allclose(_logits(packed).float(), _logits(plain).float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_changes_nothing(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = tiny_model(name, dtype=dtype)
    folder = write_package(plain, tmp_path, thirds(plain))
    everything = load_package(folder)
    count = len(everything.conmoe.manifest.prototypes)
    assert everything.conmoe.residency.all_resident
    logits, tokens = _logits(everything), _greedy(everything)
    for slots in (1, 2, count - 1):
        few = load_package(folder, slots=(slots,))
        assert few.conmoe.stats().resident == slots
        assert torch.equal(_logits(few), logits), f"{slots} slots"
        assert _greedy(few) == tokens
        assert few.conmoe.stats().misses > 0


@pytest.mark.parametrize("name", MODELS)
def test_consolidated_is_the_materialised_checkpoint(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    slots = thirds(plain)
    packed = load_package(write_package(plain, tmp_path, slots))
    full = materialise(plain, slots)
    assert torch.allclose(_logits(packed), _logits(full), atol=1e-5)
    assert _greedy(packed) == _greedy(full)


def test_prototypes_of_another_layer(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    layers = sorted(find_experts(plain))
    slots = slots_of(
        plain,
        lambda layer, expert: SlotRecord(
            ExpertId(layers[(expert + layer) % 2], expert - expert % 2)
        ),
    )
    packed = load_package(write_package(plain, tmp_path, slots), slots=(2,))
    full = materialise(plain, slots)
    assert torch.allclose(_logits(packed), _logits(full), atol=1e-5)


def _reference(model: Any, slots: Any, constants: dict[int, torch.Tensor]) -> None:
    """Replace every experts module's forward by the definition, token by token and slot by slot."""
    experts = find_experts(model)
    for layer, (_, module) in experts.items():

        def forward(
            hidden: torch.Tensor,
            index: torch.Tensor,
            weights: torch.Tensor,
            layer: int = layer,
            module: Any = module,
        ) -> torch.Tensor:
            out = torch.zeros_like(hidden)
            for t in range(hidden.shape[0]):
                for k in range(index.shape[1]):
                    slot = slots[layer][int(index[t, k])]
                    if slot.prototype is not None:
                        home: Any = experts[slot.prototype.layer][1]
                        parts = {
                            name: getattr(home, name)[slot.prototype.expert]
                            for name in part_names(home)
                        }
                        out[t] += (
                            weights[t, k]
                            * slot.scale
                            * expert_forward(module, hidden[t : t + 1], parts)[0]
                        )
                    if slot.constant is not None:
                        out[t] += weights[t, k] * constants[layer][slot.constant]
            return out

        module.forward = forward


@pytest.mark.parametrize("name", MODELS)
def test_scales_constants_and_dropped_slots(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    hidden = plain.config.hidden_size

    def choose(layer: int, expert: int) -> SlotRecord:
        if expert == 0:
            return SlotRecord(None)
        if expert == 1:
            return SlotRecord(None, constant=1)
        home = ExpertId(layer, expert - expert % 2)
        return SlotRecord(home, scale=0.25 * expert, constant=0 if expert == 5 else None)

    slots = slots_of(plain, choose)
    generator = torch.Generator().manual_seed(3)
    constants = {layer: torch.randn(2, hidden, generator=generator) for layer in slots}
    packed = load_package(write_package(plain, tmp_path, slots, constants), slots=(2,))
    with torch.no_grad():
        _reference(plain, slots, constants)
        assert torch.allclose(_logits(packed), _logits(plain), atol=2e-5)


def test_indices_outside_the_router_are_nothing(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    packed = load_package(write_package(plain, tmp_path, identity(plain)))
    _, module = next(iter(find_experts(packed).values()))
    hidden = torch.randn(3, plain.config.hidden_size)
    index = torch.tensor([[0, 8, 2], [8, 8, 8], [1, -1, 3]])
    weights = torch.rand(3, 3)
    kept = (index >= 0) & (index < 8)
    whole: torch.Tensor = module(hidden, index, weights)
    masked = module(hidden, index.where(kept, 0), weights.where(kept, 0.0))
    assert torch.allclose(whole, masked, atol=1e-6)
    assert torch.equal(whole[1], torch.zeros_like(whole[1]))


def test_no_tokens_at_all(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    packed = load_package(write_package(plain, tmp_path, thirds(plain)))
    _, module = next(iter(find_experts(packed).values()))
    out = module(
        torch.zeros(0, plain.config.hidden_size),
        torch.zeros(0, 3, dtype=torch.long),
        torch.zeros(0, 3),
    )
    assert out.shape == (0, plain.config.hidden_size)


def test_a_padded_batch_gives_what_each_sequence_gives(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    packed = load_package(write_package(plain, tmp_path, thirds(plain)), slots=(3,))
    short = IDS[:, 8:]
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, IDS.shape[1], dtype=torch.long)
    mask[1, :8] = 0
    together = packed.generate(
        torch.cat([IDS, padded]), attention_mask=mask, max_new_tokens=6, do_sample=False
    )
    assert (
        together[0].tolist() == packed.generate(IDS, max_new_tokens=6, do_sample=False)[0].tolist()
    )
    assert (
        together[1, 8:].tolist()
        == packed.generate(short, max_new_tokens=6, do_sample=False)[0].tolist()
    )


def test_the_model_in_another_dtype_than_its_records(tmp_path: Path) -> None:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    packed = load_package(
        write_package(plain, tmp_path / "package", identity(plain)), dtype=torch.float32
    )
    assert packed.dtype == torch.float32
    assert torch.allclose(_logits(packed), _logits(reference), atol=1e-5)


def test_keeps_no_graph(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    packed = load_package(write_package(plain, tmp_path, thirds(plain)))
    _, module = next(iter(find_experts(packed).values()))
    hidden = torch.randn(2, plain.config.hidden_size, requires_grad=True)
    assert not module(hidden, torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2)).requires_grad


@pytest.mark.parametrize(
    ("shape", "why"),
    [((1, 32), r"F32 \[1, 32\]"), ((2, 31), r"F32 \[2, 31\]"), ((64,), r"F32 \[64\]")],
)
def test_constants_that_do_not_fit_the_model_are_refused(
    shape: tuple[int, ...], why: str, tmp_path: Path
) -> None:
    plain = tiny_model("olmoe")
    slots = slots_of(plain, lambda layer, e: SlotRecord(ExpertId(layer, 0), 1.0, 1 if e else None))
    constants = {layer: torch.zeros(shape) for layer in slots}
    with pytest.raises(PackageError, match="constants") as caught:
        load_package(write_package(plain, tmp_path, slots, constants))
    assert re.search(why, caught.value.why)
