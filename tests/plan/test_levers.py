"""Record sizes, scopes, counts of prototypes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.checkpoint.format.layout import SMALL_RECORD
from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy
from conmoe_edge.plan.levers import (
    keeps_weights,
    kept,
    precisions,
    record_bytes,
    record_parts,
    scopes,
    spread,
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
    [
        *[((1,), 64), ((4096,), 4096), ((4096, 1), 4160), ((1, 4032), 4096), ((1, 4033), 4160)],
        *[((SMALL_RECORD,), SMALL_RECORD), ((1, SMALL_RECORD - 64), SMALL_RECORD)],
        *[((1, SMALL_RECORD - 63), SMALL_RECORD + 4096), ((SMALL_RECORD - 64,), SMALL_RECORD - 64)],
    ],
)
def test_parts_start_64_aligned_and_large_records_are_whole_pages(sizes, expected):
    assert record_bytes(_experts(*sizes), "source") == expected


@given(st.lists(st.integers(1, 80_000), min_size=1, max_size=5))
def test_record_equals_placing_byte_by_byte(sizes):
    position = 0
    for size in sizes:
        while position % 64:
            position += 1
        position += size
    while position % (4096 if position >= SMALL_RECORD else 64):
        position += 1
    assert record_bytes(_experts(*sizes), "source") == position


def _gated(hidden: int, width: int, transposed: bool = False) -> ExpertsAnatomy:
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    parts = [
        ExpertPart(name, shape[::-1] if transposed else shape, "float32", 4 * math.prod(shape))
        for name, shape in shapes.items()
    ]
    parts.append(ExpertPart("down_proj_bias", (hidden,), "float32", 4 * hidden))
    return ExpertsAnatomy("experts", 4, 2, tuple(parts), transposed)


def test_bf16_halves_float32():
    experts = _gated(64, 32)
    assert record_bytes(experts, "source") == 24832 and record_bytes(experts, "bf16") == 12416
    assert {dtype for _, _, dtype in record_parts(experts, "bf16")} == {"bfloat16"}


@pytest.mark.parametrize("transposed", [False, True])
def test_quantised_parts_are_out_by_in_however_the_module_keeps_them(transposed):
    experts = _gated(128, 96, transposed)
    assert record_parts(experts, "int8") == (
        ("gate_up_proj", (192, 128), "int8"),
        ("gate_up_proj.scale", (192,), "bfloat16"),
        ("down_proj", (128, 96), "int8"),
        ("down_proj.scale", (128,), "bfloat16"),
        ("down_proj_bias", (128,), "float32"),
    )
    assert record_parts(experts, "int4") == (
        ("gate_up_proj", (192, 64), "uint8"),
        ("gate_up_proj.scale", (2, 192, 2), "bfloat16"),
        ("down_proj", (128, 48), "uint8"),
        ("down_proj.scale", (3, 128, 2), "bfloat16"),  # 64 does not divide 96: groups of 32
        ("down_proj_bias", (128,), "float32"),
    )


def test_int4_falls_back_to_int8_for_shapes_that_it_cannot_take():
    parts = record_parts(_gated(80, 32), "int4")
    assert [dtype for _, _, dtype in parts] == ["int8", "bfloat16", "uint8", "bfloat16", "float32"]


def test_olmoe_in_few_bits(olmoe):
    experts = olmoe.layers[0].experts
    weights, rows = 3 * 2048 * 1024, 2 * 1024 + 2048
    assert record_bytes(experts, "int8") == weights + rows * 2
    assert record_bytes(experts, "int4") == weights // 2 + weights // 64 * 4


def test_precisions_asked_and_unasked(model):
    wide = {"hidden": 256, "width": 256}
    few_bits = ("int8", "int8+int4", "int4")
    assert precisions(model(**wide), "auto") == ("source", *few_bits)
    assert precisions(model(**wide, dtype="float32"), "auto") == ("source", "bf16", *few_bits)
    assert precisions(model(), "bf16") == ("bf16",)
    assert precisions(model(), "bf16+int8") == ("bf16+int8",)


def test_a_precision_that_saves_nothing_is_not_looked_at(model):
    tiny = model(hidden=4, width=4)  # two parts, of 64 bytes each; with scales four
    assert record_bytes(tiny.layers[0].experts, "source") == 2 * 64
    assert precisions(tiny, "auto") == ("source",)
    odd = model(hidden=80, width=80)  # int4 can take neither matrix
    assert precisions(odd, "auto") == ("source", "int8")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 500))
def test_wide_records_are_spread_evenly(counts, total):
    given_now, more = spread(total, counts), spread(total + 1, counts)
    assert sum(given_now) == min(total, sum(counts))
    assert all(0 <= one <= count for one, count in zip(given_now, counts, strict=True))
    assert all(a <= b for a, b in zip(given_now, more, strict=True))
    unfilled = [one for one, count in zip(given_now, counts, strict=True) if one < count]
    assert not unfilled or max(given_now) - min(unfilled) <= 1
    assert unfilled == sorted(unfilled, reverse=True)


def test_bf16_changes_weights_unless_the_checkpoint_is_bf16(model):
    assert keeps_weights(model(), "bf16")
    assert not keeps_weights(model(dtype="float16"), "bf16")
    assert keeps_weights(model(dtype="float16"), "source")
    assert not any(keeps_weights(model(), name) for name in ("int8", "int8+int4", "int4"))


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
