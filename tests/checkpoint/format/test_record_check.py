"""What is looked at in a record when it has been read."""

from __future__ import annotations

import pytest
import torch

from conmoe_edge.checkpoint.format.factored import Factors
from conmoe_edge.checkpoint.format.forms import Part, factored_parts, quantised_parts
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.checkpoint.format.record_check import _INFINITE, RecordCheck, _any_is_none
from conmoe_edge.checkpoint.format.records import pack, view


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_no_number(kind, value: float) -> None:  # type: ignore[no-untyped-def]
    layout = make_layout(quantised_parts("w", 64, 64, kind), kind)
    matrix = quantise(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), kind)
    assert matrix.scales is not None
    record = pack(layout, {"w": matrix.values, "w.scale": matrix.scales})
    assert RecordCheck(layout).wrong(record) == ""
    scales = view(layout, record)["w.scale"]
    scales.view(-1)[-1] = value
    assert "w.scale holds NaN" in RecordCheck(layout).wrong(record)
    scales.fill_(torch.finfo(torch.bfloat16).max)
    assert RecordCheck(layout).wrong(record) == ""


@pytest.mark.parametrize("dtype", sorted(_INFINITE))
def test_every_number_in_16_bits(dtype: str) -> None:
    """Alone, and beside the largest and the least that are numbers."""
    kind = getattr(torch, dtype)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    finite = every.view(kind).isfinite().tolist()
    ends = torch.tensor([torch.finfo(kind).max, torch.finfo(kind).min], dtype=kind)
    for bits, good in zip(every.split(1), finite, strict=True):
        raw = bits.view(torch.uint8).numpy()
        assert _any_is_none(raw, _INFINITE[dtype]) is not good
        beside = torch.cat([ends, bits.view(kind)]).view(torch.uint8).numpy()
        assert _any_is_none(beside, _INFINITE[dtype]) is not good


@pytest.mark.parametrize("kind", ["q4", "q3", "q2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, -2, -1])
def test_a_pair_of_a_row_that_is_no_number(kind, value: float, place: int) -> None:  # type: ignore[no-untyped-def]
    """Bytes of scales behind the pairs may be anything."""
    layout = make_layout(quantised_parts("w", 64, 64, kind), kind)
    matrix = quantise(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), kind)
    assert matrix.scales is not None
    record = pack(layout, {"w": matrix.values, "w.scale": matrix.scales})
    scales = view(layout, record)["w.scale"]
    scales[4:] = 255
    assert RecordCheck(layout).wrong(record) == ""
    pairs = scales[:4].view(-1).view(torch.bfloat16)
    pairs[place] = value
    assert "w.scale holds NaN" in RecordCheck(layout).wrong(record)


def factored(columns: list[int]) -> str:
    rows, width = 30, 40
    parts: tuple[Part, ...] = factored_parts("w", rows, width, "bfloat16")
    layout = make_layout(parts, "lowrank")
    tensors = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, shape, dtype in parts
    }
    tensors["w.columns"] = torch.tensor(columns, dtype=torch.int32)
    return RecordCheck(layout).wrong(pack(layout, tensors))


@pytest.mark.parametrize(
    "columns",
    [
        [0, 1, 2, 40],
        [-1, 1, 2, 3],
        [0, 2, 1, 3],
        [0, 1, 1, 2],
        [0, 1, 2, 2**31 - 1],
        [-(2**31), 0, 1, 2],
    ],
)
def test_columns_that_are_none(columns: list[int]) -> None:
    assert "w.columns are not ascending columns of 40" in factored(columns)


def test_columns_as_they_are_written() -> None:
    assert factored([0, 13, 38, 39]) == ""


def test_plain_records_are_not_looked_at() -> None:
    layout = make_layout([("w", (8, 8), "bfloat16"), ("w_bias", (8,), "float32")])
    record = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    assert RecordCheck(layout).wrong(record) == ""


def test_the_columns_are_those_that_compute() -> None:
    """What the check keeps out is what the product would trip over."""
    left, right = torch.ones(3, 1), torch.ones(1, 4)
    wrong = Factors(left, right, torch.ones(3, 1), torch.tensor([4], dtype=torch.int32))
    with pytest.raises((IndexError, RuntimeError)):
        wrong.product(torch.ones(1, 4))
