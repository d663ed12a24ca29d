"""Record sizes, scopes, counts of prototypes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.errors import UsageError
from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy
from conmoe_edge.plan.levers import (
    check_rate,
    check_scope,
    keeps_weights,
    kept,
    part_bytes,
    precisions,
    record_bytes,
    scopes,
)


def _experts(*sizes: int) -> ExpertsAnatomy:
    parts = tuple(ExpertPart(f"part{i}", (size,), "uint8", size) for i, size in enumerate(sizes))
    return ExpertsAnatomy("experts", 4, 2, parts)


def test_olmoe_record_is_3072_pages(olmoe):
    experts = olmoe.layers[0].experts
    assert record_bytes(experts, "source") == 3 * 2048 * 1024 * 2 == 3072 * 4096
    assert record_bytes(experts, "bf16") == record_bytes(experts, "source")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1,), 4096), ((4096,), 4096), ((4096, 1), 8192), ((1, 4032), 4096), ((1, 4033), 8192)],
)
def test_parts_start_64_aligned_and_records_are_whole_pages(sizes, expected):
    assert record_bytes(_experts(*sizes), "source") == expected


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=5))
def test_record_equals_placing_byte_by_byte(sizes):
    position = 0
    for size in sizes:
        while position % 64:
            position += 1
        position += size
    while position % 4096:
        position += 1
    assert record_bytes(_experts(*sizes), "source") == position


def test_bf16_halves_float32():
    part = ExpertPart("down_proj", (64, 32), "float32", 64 * 32 * 4)
    assert part_bytes(part, "source") == 8192
    assert part_bytes(part, "bf16") == 4096


def test_precisions_asked_and_unasked(model):
    assert precisions(model(), "auto") == ("source",)
    assert precisions(model(dtype="float32"), "auto") == ("source", "bf16")
    assert precisions(model(), "bf16") == ("bf16",)
    with pytest.raises(UsageError, match="int3"):
        precisions(model(), "int3")


def test_bf16_changes_weights_unless_the_checkpoint_is_bf16(model):
    assert keeps_weights(model(), "bf16")
    assert not keeps_weights(model(dtype="float16"), "bf16")
    assert keeps_weights(model(dtype="float16"), "source")


def test_scopes_skip_dense_layers(model):
    anatomy = model(layers=7, dense_layers=(0, 3))
    assert scopes(anatomy, 1) == ((1,), (2,), (4,), (5,), (6,))
    assert scopes(anatomy, 2) == ((1, 2), (4, 5), (6,))
    assert scopes(anatomy, 4) == ((1, 2, 4, 5), (6,))
    assert scopes(anatomy, 99) == ((1, 2, 4, 5, 6),)


def test_scopes_never_join_unequal_shapes(model):
    anatomy = model(layers=5)
    odd = model(layers=5, width=48).layers[2]
    layers = (*anatomy.layers[:2], odd, *anatomy.layers[3:])
    assert scopes(replace(anatomy, layers=layers), 4) == ((0, 1), (2,), (3, 4))


@given(st.integers(1, 600), st.floats(0, 1, exclude_max=True))
def test_kept_is_between_one_and_all(pool, rate):
    count = kept(pool, rate)
    assert 1 <= count <= pool
    assert count == 1 or abs(count - (1 - rate) * pool) <= 0.5


def test_kept_at_the_grid():
    assert [kept(64, rate / 8) for rate in range(7)] == [64, 56, 48, 40, 32, 24, 16]
    assert kept(8, 0.99) == 1


@pytest.mark.parametrize("rate", [-0.1, 1.0, 25.0, math.nan, math.inf])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(UsageError) as caught:
        check_rate(rate)
    assert "--rate" in caught.value.fix


def test_a_percentage_is_recognised():
    with pytest.raises(UsageError) as caught:
        check_rate(25)
    assert caught.value.fix == "--rate 0.25"


def test_scope_must_be_positive():
    with pytest.raises(UsageError):
        check_scope(0)
