"""Where the parts of a record lie, and how wide its experts are."""

from __future__ import annotations

import pytest

from conmoe_edge.checkpoint.format.forms import Part, factored_parts, quantised_parts
from conmoe_edge.checkpoint.format.layout import SMALL_RECORD, expert_width, make_layout, neurons

WIDTH, HIDDEN = 96, 64


def test_parts_are_aligned_and_large_records_are_pages() -> None:
    layout = make_layout([("a", (3, 5), "float32"), ("b", (), "bfloat16"), ("c", (2000,), "int16")])
    assert [(part.offset, part.nbytes) for part in layout.parts] == [(0, 60), (64, 2), (128, 4000)]
    assert layout.nbytes == 4160
    assert make_layout([("nothing", (0,), "float32")]).nbytes == 64
    assert make_layout([("a", (SMALL_RECORD - 1,), "uint8")]).nbytes == SMALL_RECORD
    assert make_layout([("a", (SMALL_RECORD + 1,), "uint8")]).nbytes == SMALL_RECORD + 4096


def test_two_parts_of_one_name() -> None:
    with pytest.raises(ValueError, match="same name"):
        make_layout([("w", (1,), "float32"), ("w", (2,), "float32")])


def test_neurons_are_the_inputs_of_the_down_projection() -> None:
    assert neurons((HIDDEN, WIDTH), False) == neurons((WIDTH, HIDDEN), True) == WIDTH
    assert neurons((8, HIDDEN, WIDTH), False) == neurons((8, WIDTH, HIDDEN), True) == WIDTH


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        quantised_parts("down_proj", HIDDEN, WIDTH, "int8"),
        quantised_parts("down_proj", HIDDEN, WIDTH, "int4"),
        factored_parts("down_proj", HIDDEN, WIDTH, "bfloat16"),
    ],
    ids=["int8", "int4", "factored"],
)
def test_the_width_of_other_forms(parts: tuple[Part, ...], transposed: bool) -> None:
    assert expert_width(make_layout(parts), transposed) == WIDTH


def test_the_width_of_a_plain_record() -> None:
    assert expert_width(make_layout([("down_proj", (HIDDEN, WIDTH), "float32")])) == WIDTH
    assert expert_width(make_layout([("down_proj", (WIDTH, HIDDEN), "float32")]), True) == WIDTH


def test_a_record_that_does_not_tell() -> None:
    assert expert_width(make_layout([("up_proj", (WIDTH, HIDDEN), "float32")])) == 0
    assert expert_width(make_layout([("down_proj", (WIDTH,), "float32")])) == 0
