"""The map of a layer as the compiled operator reads it: against the plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.offload.kernels.cpu.bindings import LayerTable, PrototypeTable, operator

ENGINE = operator()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="no compiler here")
HIDDEN, WIDTH, COUNT = 32, 16, 5


def experts() -> list[tuple]:
    """Up and down of every prototype."""
    generator = torch.Generator().manual_seed(0)
    assert ENGINE is not None
    return [
        tuple(
            ENGINE.prepare(quantise(torch.randn(rows, columns, generator=generator), "plain"))
            for rows, columns in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))
        )
        for _ in range(COUNT)
    ]


EXPERTS = experts() if ENGINE is not None else []
FORMS = (EXPERTS[0][0].form, EXPERTS[0][1].form) if EXPERTS else None


def table_of(numbers: list[int]) -> PrototypeTable:
    table = PrototypeTable(COUNT)
    for number in numbers:
        table.put(number, *EXPERTS[number])
    return table


def a_map(*targets: int, constants: tuple[int, ...] | None = None) -> SlotMap:
    return SlotMap(3, targets, (1.0,) * len(targets), constants or (NONE,) * len(targets))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_operator_computes_what_the_reference_says(data: st.DataObject) -> None:
    assert ENGINE is not None
    count = data.draw(st.integers(1, 6))
    size = {"min_size": count, "max_size": count}
    slots = SlotMap(
        0,
        tuple(data.draw(st.lists(st.integers(NONE, COUNT - 1), **size))),
        tuple(data.draw(st.lists(st.sampled_from([1.0, 0.5, -2.0]), **size))),
        tuple(data.draw(st.lists(st.integers(NONE, 2), **size))),
    )
    chosen = data.draw(st.lists(st.integers(-1, count), min_size=1, max_size=count))
    generator = torch.Generator().manual_seed(1)
    gates, x = torch.rand(1, len(chosen), generator=generator), torch.randn(1, HIDDEN)
    constants = torch.randn(3, HIDDEN, generator=generator)
    prototypes = table_of(list(range(COUNT)))
    table = LayerTable(prototypes, [FORMS], slots, constants)
    found = ENGINE.layer(table, torch.tensor([chosen]), gates, x)
    assert found is not None
    merged = slots.merge(chosen, gates[0].tolist())
    assert table.asked(found[1]) == list(merged)
    rows = [
        (constants[row], gate) for row, gate in slots.gated_constants(chosen, gates[0].tolist())
    ]
    some = [EXPERTS[number] for number in merged]
    outputs = (
        ENGINE.gated_experts([up for up, _ in some], [down for _, down in some], x)
        if some
        else torch.empty(0, HIDDEN)
    )
    wanted = ENGINE.combine(outputs, list(merged.values()), torch.float32, rows)
    assert torch.equal(found[0], wanted)


def test_a_prototype_that_is_not_there_is_told() -> None:
    assert ENGINE is not None
    prototypes = table_of([0, 1])
    table = LayerTable(prototypes, [FORMS], a_map(0, 1, 2), None)
    x, gates = torch.ones(1, HIDDEN), torch.ones(1, 1)
    assert ENGINE.layer(table, torch.tensor([[1]]), gates, x) is not None
    assert ENGINE.layer(table, torch.tensor([[2]]), gates, x) is None
    prototypes.remove(1)
    assert ENGINE.layer(table, torch.tensor([[1]]), gates, x) is None


@pytest.mark.parametrize(
    ("slots", "constants"),
    [
        (a_map(0, COUNT), None),
        (a_map(0, -2), None),
        (a_map(0, 1, constants=(NONE, 0)), None),
        (a_map(0, 1, constants=(NONE, 1)), torch.zeros(1, HIDDEN)),
        (a_map(0, 1, constants=(NONE, 0)), torch.zeros(1, HIDDEN - 1)),
        (a_map(0, 1, constants=(NONE, 0)), torch.zeros(1, HIDDEN).bfloat16()),
        (a_map(0, 1, constants=(NONE, 0)), torch.zeros(1, 2 * HIDDEN)[:, ::2]),
    ],
)
def test_addresses_that_would_lead_elsewhere_are_refused(
    slots: SlotMap, constants: torch.Tensor | None
) -> None:
    with pytest.raises(ValueError, match=r"layer 3|contiguous"):
        LayerTable(table_of([]), [FORMS], slots, constants)


def other_form(rows: int, columns: int, kind: str = "int8"):  # type: ignore[no-untyped-def]
    assert ENGINE is not None
    found = ENGINE.prepare(quantise(torch.randn(rows, columns), kind))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_a_prototype_in_another_form_than_its_layer_expects_is_refused() -> None:
    """One call reads all prototypes of a layer as one kind; bf16 rows read as int8 would end beyond them."""
    assert FORMS is not None
    eight_bits = other_form(2 * WIDTH, HIDDEN), other_form(HIDDEN, WIDTH)
    table = table_of([0])
    LayerTable(table, [FORMS], a_map(0, 1), None)
    with pytest.raises(ValueError, match="prototype 1 has another form"):
        table.put(1, *eight_bits)
    table.put(2, *eight_bits)  # no layer has asked for it yet
    with pytest.raises(ValueError, match="prototype 2 has another form"):
        LayerTable(table, [FORMS], a_map(2), None)
    with pytest.raises(ValueError, match="prototype 0 has another form"):
        LayerTable(table, [(eight_bits[0].form, eight_bits[1].form)], a_map(0), None)
    table.put(1, *EXPERTS[1])


@pytest.mark.parametrize(
    ("up", "down"),
    [((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH + 8)), ((2 * WIDTH, HIDDEN), (HIDDEN + 8, WIDTH))],
)
def test_matrices_that_do_not_go_together_are_refused(
    up: tuple[int, int], down: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="do not go together"):
        PrototypeTable(1).put(0, other_form(*up), other_form(*down))
