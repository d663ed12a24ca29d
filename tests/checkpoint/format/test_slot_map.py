"""The map of a layer: the plain reference against the formula, and torch's rendering against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap, sharing_layers
from conmoe_edge.model.slot_tensors import SlotTensors

CPU = torch.device("cpu")
FIRST, SECOND = ExpertId(0, 1), ExpertId(0, 3)
SLOTS = (
    SlotRecord(FIRST, 1.0, None),
    SlotRecord(SECOND, 0.5, 1),
    SlotRecord(None, 1.0, 0),
    SlotRecord(FIRST, 1.0, None),
    SlotRecord(None, 1.0, None),
)


def some_map() -> SlotMap:
    return SlotMap.of(7, SLOTS, {FIRST: 4, SECOND: 9})


def test_it_says_what_the_slots_say() -> None:
    found = some_map()
    assert found == SlotMap(
        7, (4, 9, NONE, 4, NONE), (1.0, 0.5, 1.0, 1.0, 1.0), (NONE, 1, 0, NONE, NONE)
    )
    assert len(found) == 5 and found.prototypes == (4, 9)
    assert found.is_scaled and found.has_constants and found.constant_rows == 2


def test_slots_that_meet_on_a_prototype_are_added_up_and_skip_marks_add_nothing() -> None:
    found = some_map()
    assert found.merge([3, 1, 0, 5, -1], [0.25, 0.5, 0.125, 9.0, 9.0]) == {4: 0.375, 9: 0.25}
    assert found.gated_constants([2, 4, 1, 7], [0.5, 0.25, 2.0, 1.0]) == [(0, 0.5), (1, 2.0)]


def test_other_numbers() -> None:
    assert some_map().renumbered({9: 0}).targets == (NONE, 0, NONE, NONE, NONE)


def test_constants_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1"):
        SlotTensors.of(some_map(), torch.zeros(1, 3), CPU)
    with pytest.raises(ValueError, match="has 0 constants"):
        SlotTensors.of(some_map(), None, CPU)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_torch_computes_what_the_reference_says(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 6))
    chosen = data.draw(st.integers(1, 4))
    target = st.integers(NONE, 4)
    size = {"min_size": experts, "max_size": experts}
    found = SlotMap(
        0,
        tuple(data.draw(st.lists(target, **size))),
        tuple(data.draw(st.lists(st.sampled_from([1.0, 0.5, -2.0]), **size))),
        tuple(data.draw(st.lists(st.integers(NONE, 2), **size))),
    )
    row = {"min_size": chosen, "max_size": chosen}
    slots = data.draw(st.lists(st.lists(st.integers(-1, experts), **row), min_size=1, max_size=3))
    gates = torch.rand(len(slots), chosen, generator=torch.Generator().manual_seed(0))
    constants = torch.arange(9.0).view(3, 3)
    tensors = SlotTensors.of(found, constants, CPU)
    index = torch.tensor(slots)
    routes = tensors.routes(index, gates)
    alphas: list[dict[int, float]] = [{} for _ in slots]
    for position, number in enumerate(routes.prototypes):
        span = slice(routes.starts[position], routes.starts[position + 1])
        for token, weight in zip(routes.rows[span].tolist(), routes.weights[span], strict=True):
            alphas[token][number] = float(weight)
    total = torch.zeros(len(slots), 3)
    tensors.add_constants(total, index, gates)
    for token, chosen_slots in enumerate(slots):
        own = gates[token].tolist()
        assert alphas[token] == pytest.approx(found.merge(chosen_slots, own), abs=1e-6)
        wanted = torch.zeros(3)
        for place, gate in found.gated_constants(chosen_slots, own):
            wanted += constants[place] * gate
        assert torch.allclose(total[token], wanted, atol=1e-5)


def layers_of(*targets: tuple[int, ...]) -> dict[int, SlotMap]:
    return {
        layer: SlotMap(layer, row, (1.0,) * len(row), (NONE,) * len(row))
        for layer, row in enumerate(targets)
    }


def test_layers_that_share_prototypes_are_one_group() -> None:
    assert sharing_layers(layers_of((0,), (1,), (2, NONE), (NONE,))) == ((0,), (1,), (2,), (3,))
    assert sharing_layers(layers_of((0, 1), (2,), (1, 3), (4, 2))) == ((0, 2), (1, 3))
    assert sharing_layers(layers_of((0,), (1,), (2,), (2, 0))) == ((0, 2, 3), (1,))
    assert sharing_layers({}) == ()


@given(st.lists(st.lists(st.integers(NONE, 5), min_size=1, max_size=3), max_size=6))
def test_groups_are_those_of_a_search(rows: list[list[int]]) -> None:
    """Layers that can be reached from one another, layer by layer."""
    maps = layers_of(*map(tuple, rows))
    shared = {layer: set(one.prototypes) for layer, one in maps.items()}
    wanted = set()
    for layer in maps:
        reached, before = {layer}, set()
        while reached != before:
            before = set(reached)
            reached |= {n for n in maps for one in before if shared[n] & shared[one]}
        wanted.add(tuple(sorted(reached)))
    assert sharing_layers(maps) == tuple(sorted(wanted))
