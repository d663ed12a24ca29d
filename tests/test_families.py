"""The same code serves every architecture: streaming, consolidating and running tiny instances of 25 families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, materialise, save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.format.records import decode, view
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, index_files
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model import bridge
from conmoe_edge.model.experts import expert_forward, find_experts
from conmoe_edge.model.rerouting import can_choose, reroute
from conmoe_edge.model.router import find_routers
from conmoe_edge.model.streaming import Batch, StreamedModel

NAMES = [family.model_type for family in FAMILIES]
LENGTH = 20


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def original(folder: Path):
    from transformers import AutoModelForCausalLM

    bridge.register_model()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def streamed_logits(folder: Path, mask: torch.Tensor | None) -> torch.Tensor:
    index = CheckpointIndex.open(folder)
    with ShardReader(index) as reader:
        model = StreamedModel(
            bridge.read_config(str(folder)),
            list(index.tensors),
            lambda keys: {key: reader[key] for key in keys},
            dtype=torch.float32,
            experts_dtype=torch.float32,
            device=torch.device("cpu"),
        )
        model.load_outside()
        batch = Batch(tokens(), mask)
        hidden = model.prologue(batch)
        for layer in range(len(model.layers)):
            with model.layer(layer):
                hidden = model.run_layer(layer, hidden, batch)
        return model.epilogue(batch, hidden)


@pytest.mark.parametrize("name", NAMES)
def test_streamed_logits_equal_from_pretrained_exactly(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = original(tmp_path)
    padded = torch.ones(2, LENGTH, dtype=torch.long)
    padded[1, :4] = 0
    for mask in (None, padded):
        with torch.no_grad():
            wanted = model(input_ids=tokens(), attention_mask=mask, use_cache=False).logits
        real = slice(None) if mask is None else mask.bool()
        assert torch.equal(streamed_logits(tmp_path, mask)[real], wanted[real])


@pytest.fixture(params=NAMES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    save_tiny(request.param, folder)
    save_tokenizer(folder)
    return folder


def fit(source: Path, out: Path, rate: float, scope: int = 1, method: str = "conmoe") -> None:
    text = source.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        rate=rate,
        scope=scope,
        method=method,
        calibration=text,
        calibration_tokens=1024,
    )


def greedy(model, prompt: torch.Tensor) -> list[int]:
    return model.generate(input_ids=prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)[
        0
    ].tolist()


def assert_same(runtime, reference) -> None:
    with torch.no_grad():
        wanted = reference(input_ids=tokens(), use_cache=False).logits
        found = runtime(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert greedy(runtime, tokens()[:1]) == greedy(reference, tokens()[:1])


def test_runtime_equals_transformers(source: Path, tmp_path: Path) -> None:
    """Identity map: the package gives what the model gives. Half the experts: what a materialised checkpoint gives."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    fit(source, whole, 0.0)
    assert_same(api.load(whole, device="cpu"), original(source))
    scope = 2 if len(find_experts(original(source))) > 1 else 1
    fit(source, half, 0.5, scope)
    manifest = load_manifest(half)
    assert len(manifest.prototypes) == sum(len(slots) for slots in manifest.slots.values()) // 2
    reference = materialise(original(source), manifest.slots)
    assert_same(api.load(half, device="cpu"), reference)
    assert manifest.receipt["tokens"] > 0 and manifest.receipt["kl"] > 0
    records = sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)
    assert records == manifest.plan["chosen"]["pool_bytes"], "bytes planned are bytes written"
    assert_same_with_one_slot(half)


@pytest.mark.parametrize("method", ["auto", "m-smoe", "mc-smoe", "mergemoe"])
def test_changed_weights_run_as_the_records_say(method: str, source: Path, tmp_path: Path) -> None:
    """Narrow, merged and factored prototypes, scales, constants: the runtime against a loop over tokens and slots."""
    package = tmp_path / method
    # Records of these experts have a page or two: at 50 % all of them could be narrow.
    fit(source, package, 0.3 if method == "auto" else 0.5, method=method)
    manifest = load_manifest(package)
    sizes = [layout.nbytes for layout in manifest.layouts]
    left = manifest.plan["chosen"]["pool_bytes"] - sum(
        sizes[entry.layout] for entry in manifest.prototypes
    )
    if method == "auto":
        assert len(manifest.layouts) > 1, "prototypes of different widths"
        assert 0 <= left < max(sizes)
    else:
        assert left == 0, "bytes planned are bytes written"
    assert 0 < manifest.receipt["kl"] < 5
    reference = original(source)
    constants = read_constants(package / CONSTANTS_FILE, SlotMap.of_manifest(manifest))
    files = sorted({entry.file for entry in manifest.prototypes})
    with ShardReader(index_files(package, files)) as reader:
        for layer, (_, module) in find_experts(reference).items():
            parts = {
                entry.id: decode(
                    view(
                        manifest.layouts[entry.layout],
                        reader[f"prototypes.{entry.id.layer}.{entry.id.expert}"][...],
                    ),
                    torch.float32,
                    bool(module.is_transposed),
                )
                for entry in manifest.prototypes
                if entry.id.layer == layer
            }
            module.forward = by_the_records(
                module, manifest.slots[layer], parts, constants.get(layer)
            )
    assert_same(api.load(package, device="cpu"), reference)
    assert_same_with_one_slot(package)


def test_reap_runs_as_its_router_is_kept_to_the_rest(source: Path, tmp_path: Path) -> None:
    """Every fourth expert goes. The reference is the original, its router hidden from what is gone."""
    package = tmp_path / "reap"
    fit(source, package, 0.25, method="reap")
    manifest = load_manifest(package)
    assert manifest.rerouted == tuple(manifest.slots) and 0 < manifest.receipt["kl"] < 5
    reference = original(source)
    routers = find_routers(bridge.build_meta(bridge.read_config(str(source)), torch.float32))
    for layer, router in routers.items():
        is_open = manifest.open_slots(layer)
        assert sum(is_open) == 6 and can_choose(router.selection, is_open)
        module = reference.get_submodule(router.path)
        reroute(replace(router, module=module), is_open)
    assert_same(api.load(package, device="cpu"), reference)
    assert_same_with_one_slot(package)


def by_the_records(module, slots, parts, constants):
    """sum over a token's slots of g (s prototype(x) + c), one token and one slot at a time."""

    def forward(hidden, index, weights):
        shape = hidden.shape
        rows = hidden.reshape(-1, shape[-1])
        index, weights = index.reshape(len(rows), -1), weights.reshape(len(rows), -1)
        out = torch.zeros_like(rows)
        for t in range(len(rows)):
            for number, gate in zip(index[t].tolist(), weights[t].tolist(), strict=True):
                if not 0 <= number < len(slots):
                    continue
                slot = slots[number]
                if slot.prototype is not None:
                    value = expert_forward(module, rows[t : t + 1], parts[slot.prototype])
                    out[t] += gate * slot.scale * value[0]
                if slot.constant is not None:
                    out[t] += gate * constants[slot.constant]
        return out.view(shape)

    return forward


def assert_same_with_one_slot(package: Path) -> None:
    """Memory changes speed, never the output: to the last bit, and the same greedy tokens."""
    resident = api.load(package, device="cpu")
    layouts = len(resident.conmoe.manifest.layouts)
    starved = load_package(package, device="cpu", slots=(1,) * layouts)
    with torch.no_grad():
        wanted = resident(input_ids=tokens(), use_cache=False).logits
        assert torch.equal(starved(input_ids=tokens(), use_cache=False).logits, wanted)
    assert starved.conmoe.stats().misses > 0 and resident.conmoe.stats().misses == 0
    assert greedy(starved, tokens()[:1]) == greedy(resident, tokens()[:1])
