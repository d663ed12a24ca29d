"""What the plugin for vLLM works with, apart from vLLM: tables of slots, shares of ranks, weights from records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from hand_packages import identity, slots_of, thirds, write_package
from hypothesis import given, settings
from hypothesis import strategies as st

import conmoe_edge
from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest, SlotRecord
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.integrations.vllm.layer_stacks import (
    NotServable,
    check_servable,
    layer_stacks,
    share_of,
)
from conmoe_edge.integrations.vllm.stacked_weights import (
    Package,
    RankSlots,
    fill,
    gated_sum,
    map_choice,
    padded_constants,
)
from conmoe_edge.model.experts import find_experts


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def manifest(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(write_package(model, tmp_path_factory.mktemp("p") / "p", thirds(model)))


def with_slots(manifest: Manifest, rows: dict[int, list[SlotRecord]]) -> Manifest:
    return replace(manifest, slots={layer: tuple(row) for layer, row in rows.items()})


def test_slots_lead_to_their_prototype_in_the_stack(manifest: Manifest) -> None:
    table = layer_stacks(manifest)[1]
    assert table.stack == (ExpertId(1, 0), ExpertId(1, 3), ExpertId(1, 6))
    assert table.slots.targets == (0, 0, 0, 1, 1, 1, 2, 2)
    assert (table.leader, table.width) == (1, 48)
    assert not table.slots.is_scaled and not table.slots.has_constants


def test_layers_that_share_prototypes_share_a_stack(manifest: Manifest) -> None:
    a, b, c = ExpertId(0, 0), ExpertId(1, 3), ExpertId(2, 6)
    tables = layer_stacks(
        with_slots(
            manifest,
            {
                0: [SlotRecord(a), SlotRecord(None)],
                1: [SlotRecord(b, 0.5), SlotRecord(None, 1.0, 0)],
                2: [SlotRecord(c), SlotRecord(a)],
            },
        )
    )
    assert [tables[layer].leader for layer in range(3)] == [0, 1, 0]
    assert tables[0].stack == tables[2].stack == (a, c)
    assert (tables[0].slots.targets, tables[2].slots.targets) == ((0, -1), (1, 0))
    assert tables[1].slots.scales == (0.5, 1.0) and tables[1].slots.constants == (-1, 0)


def test_stacks_that_are_joined_by_a_third_layer_are_one(manifest: Manifest) -> None:
    a, b = ExpertId(0, 0), ExpertId(1, 3)
    tables = layer_stacks(
        with_slots(
            manifest,
            {0: [SlotRecord(a)], 1: [SlotRecord(b)], 2: [SlotRecord(b), SlotRecord(a)]},
        )
    )
    assert {table.leader for table in tables.values()} == {0}
    assert {table.stack for table in tables.values()} == {(a, b)}


@pytest.mark.parametrize(("count", "ranks"), [(6, 2), (7, 2), (2, 3), (0, 2)])
def test_ranks_hold_everything_once(count: int, ranks: int) -> None:
    stack = tuple(ExpertId(0, e) for e in range(count))
    shares = [share_of(stack, rank, ranks) for rank in range(ranks)]
    assert [place for share in shares for place in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_ranks_weights_are_those_of_the_experts(ranks: int, tmp_path: Path) -> None:
    """Put together again they give the expert; what fills a rank up is zero."""
    model = tiny_model("qwen3_moe")
    package = Package(write_package(model, tmp_path / "p", identity(model)))
    module: Any = find_experts(model)[0][1]
    stack = package.stacks[0].stack[2:4]
    part = -(-16 // ranks)
    gates, ups, downs = [], [], []
    for rank in range(ranks):
        w13 = torch.full((2, 2 * part, 32), torch.nan)
        w2 = torch.full((2, 32, part), torch.nan)
        fill(package, stack, w13, w2, rank=rank, ranks=ranks, width=16)
        gates.append(w13[:, :part])
        ups.append(w13[:, part:])
        downs.append(w2)
    gate, up, down = torch.cat(gates, 1), torch.cat(ups, 1), torch.cat(downs, 2)
    assert torch.equal(torch.cat([gate[:, :16], up[:, :16]], 1), module.gate_up_proj[2:4])
    assert torch.equal(down[..., :16], module.down_proj[2:4])
    assert not any(bool(rest.any()) for rest in (gate[:, 16:], up[:, 16:], down[..., 16:]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_prototypes_of_different_widths_are_filled_up_with_zeros(
    ranks: int, tmp_path: Path
) -> None:
    """All ranks together, computed as an engine does, give what the package's own runtime gives."""
    model = tiny_model("qwen3_moe")
    slots = thirds(model)
    prototypes = sorted({slot.prototype for row in slots.values() for slot in row})
    widths = {one: (12, 5, 9)[number % 3] for number, one in enumerate(prototypes)}
    folder = write_package(model, tmp_path / "p", slots, widths=widths)
    package = Package(folder)
    assert len(package.manifest.layouts) == 3
    runtime = find_experts(conmoe_edge.load(folder, device="cpu"))
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    index = torch.rand(20, 8, generator=torch.Generator().manual_seed(2)).topk(3).indices
    gates = torch.rand(20, 3, generator=torch.Generator().manual_seed(3))
    for layer, table in package.stacks.items():
        stack, width = table.stack, table.width
        assert width == 12 and len(stack) == 3
        part = -(-width // ranks)
        out = torch.zeros(20, 32)
        for rank in range(ranks):
            w13 = torch.full((3, 2 * part, 32), torch.nan)
            w2 = torch.full((3, 32, part), torch.nan)
            fill(package, stack, w13, w2, rank=rank, ranks=ranks, width=width)
            for t in range(20):
                for slot, gate in zip(index[t].tolist(), gates[t], strict=True):
                    place = table.slots.targets[slot]
                    one, up = (w13[place] @ hidden[t]).chunk(2)
                    out[t] += gate * (w2[place] @ (torch.nn.functional.silu(one) * up))
        with torch.no_grad():
            wanted = runtime[layer][1](hidden, index, gates)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-6)


def test_what_an_engine_cannot_take_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    check_servable(tmp_path, manifest)
    with pytest.raises(NotServable, match="--for vllm"):
        check_servable(tmp_path, replace(manifest, dense_precision="int8"))

    class Masked:
        """A manifest with the field that pruning methods write."""

        dense_precision = kv_precision = "source"
        layouts = manifest.layouts
        rerouted = (1,)

    masked: Any = Masked()
    with pytest.raises(NotServable, match=r"conmoe-edge export .* --format hf DIR"):
        check_servable(tmp_path, masked)


def test_experts_with_biases_are_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    with pytest.raises(NotServable, match="down_proj_bias"):
        Package(write_package(model, tmp_path / "p", identity(model)))


def test_constants_come_from_the_package(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    constants = {layer: torch.randn(1, 32) for layer in find_experts(model)}
    slots = slots_of(
        model,
        lambda layer, e: SlotRecord(None, 1.0, 0) if e == 3 else SlotRecord(ExpertId(layer, e)),
    )
    package = Package(write_package(model, tmp_path / "p", slots, constants))
    found = package.constants(1)
    assert found is not None and torch.equal(found, constants[1])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_all_ranks_together_compute_what_the_map_says(data: st.DataObject) -> None:
    """Weights by position in the stack, added over the ranks, and the constants: those of the plain reference."""
    experts, chosen = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    size = {"min_size": experts, "max_size": experts}
    slots = SlotMap(
        0,
        tuple(data.draw(st.lists(st.integers(NONE, 4), **size))),
        tuple(data.draw(st.lists(st.sampled_from([1.0, 0.5, -2.0]), **size))),
        tuple(data.draw(st.lists(st.integers(NONE, 2), **size))),
    )
    row = data.draw(st.lists(st.integers(0, experts - 1), min_size=chosen, max_size=chosen))
    gates = torch.rand(1, chosen, generator=torch.Generator().manual_seed(0))
    ranks = data.draw(st.integers(1, 3))
    stack = tuple(ExpertId(0, number) for number in range(5))
    found = torch.zeros(5)
    for rank in range(ranks):
        held = share_of(stack, rank, ranks)
        mine = RankSlots.of(slots, held)
        factor = mine.factor if mine.weighs else None
        places, weights = map_choice(mine.target, factor, torch.tensor([row]), gates)
        found[held.start : held.stop] += torch.zeros(len(held)).scatter_add_(
            0, places[0], weights[0]
        )
    wanted = torch.zeros(5)
    for number, weight in slots.merge(row, gates[0].tolist()).items():
        wanted[number] = weight
    assert torch.allclose(found, wanted, atol=1e-6)
    rows = torch.arange(9.0).view(3, 3)
    padded, row_of = padded_constants(slots, rows)
    total = gated_sum(padded, row_of, torch.tensor([row]), gates)
    added = torch.zeros(3)
    for number, gate in slots.gated_constants(row, gates[0].tolist()):
        added += rows[number] * gate
    assert torch.allclose(total[0], added, atol=1e-5)
