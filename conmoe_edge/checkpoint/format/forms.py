"""Which stored form a weight matrix can take, and the shapes and number formats of its parts. No torch here.

``quantise.py`` describes the forms and makes them; the plan counts with the same rules, so that bytes planned are bytes
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["plain", "int8", "int4", "grid4", "mxfp4", "q6", "q4", "q3", "q2"]
Stored = tuple[str, Sequence[int]]
"""Number format (torch's name) and shape of a tensor."""
Part = tuple[str, tuple[int, ...], str]
"""Name, shape and number format (torch's name) of one tensor of a record."""

GROUPS = (64, 32)
"""Columns that share a scale in int4: the first of these that divides the columns."""

TILES = (64, 32, 16)
"""Rows of a tile in all forms of less than 8 bits: the first of these that divides the rows."""

MX_BLOCK = 32
"""Columns that share a scale in mxfp4."""

UP, DOWN = "gate_up_proj", "down_proj"
"""The two weight matrices of a gated expert: gate and up rows together, and down rows."""

LOW_BITS: dict[Kind, int] = {"q6": 6, "q4": 4, "q3": 3, "q2": 2}
"""Bits of a number in the forms of ``low_bits.py``."""

DENSE_KINDS: dict[str, Kind] = {"int8": "int8", "q6": "q6", "q4": "q4"}
"""The forms of matrices outside the routed experts, by the names of their precisions, mildest first."""

LOW_GROUP, LOW_HEAD = 32, 4
"""Columns that share a byte of scales there, and rows of the scales before those bytes."""

SCALE = ".scale"
"""What the name of a quantised weight's scales has behind the name of the weight."""

_E8M0 = "float8_e8m0fnu"
_KIND_OF_FORMATS: dict[tuple[str, str], Kind] = {
    ("int8", "bfloat16"): "int8",
    ("uint8", "bfloat16"): "int4",
    ("uint8", _E8M0): "mxfp4",
}
"""Number formats of a quantised weight's values and scales -> its form."""

_HALVES = ("float16", "bfloat16")
"""Number formats that the scales of grid4 may have: those of the checkpoint."""
_LANES = 16
"""What a group of grid4 is a multiple of: kernels take so many columns at a time."""

LEFT, RIGHT, KEPT, COLUMNS = ".left", ".right", ".kept", ".columns"
"""What the names of a factored weight's parts have behind the name of the weight (``factored.py``)."""

_RANK_SHARE = 24
"""Of the shorter side of a matrix, the part that is its rank."""
_KEPT_SHARE = 10
"""Of the columns, the part that is kept beside it."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the weights lie that other tools have rounded to 4 bits: weight = (number - zero point) * scale.

    Attributes:
        group: columns that share a scale.
        dtype: number format of the scales, which the product is rounded to.
        zeros: whether groups have zero points of their own; they are 8 otherwise.
    """

    group: int
    dtype: str
    zeros: bool

    def takes(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this shape can be stored so (``grid4``)."""
        return first_divisor(TILES, rows) > 0 and columns % self.group == 0

    def scales(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales: those of a group one after another, with zero points in pairs."""
        return columns // self.group, rows * (1 + self.zeros)


def grid_of(values: Stored, scales: Stored) -> Grid | None:
    """The grid of a weight in grid4 by its values and scales; ``None`` where they are not in that form."""
    if values[0] != "uint8" or scales[0] not in _HALVES or len(values[1]) != 2:
        return None
    if len(scales[1]) != 2 or 0 in values[1] or 0 in scales[1]:
        return None
    (rows, half), (groups, wide) = values[1], scales[1]
    if wide not in (rows, 2 * rows) or 2 * half % groups or 2 * half // groups % _LANES:
        return None
    return Grid(2 * half // groups, scales[0], wide > rows)


def first_divisor(sizes: tuple[int, ...], length: int) -> int:
    """The first of ``sizes`` that divides ``length``; 0 where none does."""
    return next((size for size in sizes if length % size == 0), 0)


def group_of(columns: int) -> int:
    """Columns that share a scale in an int4 matrix of ``columns`` columns; 0 where int4 cannot take it."""
    return first_divisor(GROUPS, columns)


def kind_of(values: Stored, scales: Stored | None) -> Kind | None:
    """The form of a weight by its values and scales; ``plain`` without scales, ``None`` for a pair that no form has.

    The shapes are looked at only where the number formats leave it open.
    """
    if scales is None:
        return "plain"
    if (values[0], scales[0]) == ("uint8", "uint8"):
        return _low_kind(values[1], scales[1])
    if grid_of(values, scales) is not None:
        return "grid4"
    return _KIND_OF_FORMATS.get((values[0], scales[0]))


def _low_kind(values: Sequence[int], scales: Sequence[int]) -> Kind | None:
    if len(values) != 2 or len(scales) != 2 or values[0] != scales[1]:
        return None
    columns = (scales[0] - LOW_HEAD) * LOW_GROUP
    for kind, bits in LOW_BITS.items():
        if values[1] * 8 == columns * bits > 0:
            return kind
    return None


def bits_of(kind: Kind) -> int:
    """Bits of a number in the values of a quantised form, without its scales."""
    return LOW_BITS.get(kind, 8 if kind == "int8" else 4)


def in_tiles(kind: Kind | None) -> bool:
    """Whether rows lie in tiles, several numbers in a byte."""
    return kind in ("int4", "grid4", "mxfp4") or kind in LOW_BITS


def columns_of(kind: Kind, values: Sequence[int]) -> int:
    """Columns of a quantised weight whose values have this shape."""
    return values[-1] * 8 // bits_of(kind)


def best_kind(rows: int, columns: int, wished: Kind) -> Kind:
    """``wished``, or where it cannot take a matrix of this shape: int8 for int4 and those of ``LOW_BITS``; plain for
    mxfp4, whose numbers stay what they are.
    """
    if not in_tiles(wished):
        return wished
    group = group_of(columns) if wished == "int4" else not columns % LOW_GROUP
    group = group or wished == "grid4"  # whose groups are its own
    if first_divisor(TILES, rows) and group:
        return wished
    return "plain" if wished == "mxfp4" else "int8"


def dense_kind(
    rows: int, columns: int, wished: Kind, *, in_rows: bool = False, at_an_end: bool = False
) -> Kind:
    """``wished``, int8 or one of ``LOW_BITS``, or int8 where it does not suit a matrix outside the routed experts.

    Of those with tiles only whole ones of 64 rows are taken, since others are none for the CPU operator; ``in_rows``
    where a matrix cannot lie in tiles at all. ``at_an_end``: embeddings and head have 6 bits beside matrices in 4,
    because every token goes through them and nothing behind or before makes up for their errors.
    """
    if in_rows or rows % TILES[0] or columns % LOW_GROUP:
        return "int8"
    return "q6" if at_an_end and wished == "q4" else wished


def quantised_parts(
    name: str, rows: int, columns: int, kind: Kind, grid: Grid | None = None
) -> tuple[Part, Part]:
    """Values and scales of the weight ``name`` [rows, columns] (rows are outputs) in the form ``kind``; ``grid`` is
    that of grid4.
    """
    if kind == "plain":
        raise ValueError("plain is no quantised form")
    values = rows, columns * bits_of(kind) // 8
    if kind == "int8":
        return (name, values, "int8"), (name + SCALE, (rows,), "bfloat16")
    if grid is not None:
        return (name, values, "uint8"), (name + SCALE, grid.scales(rows, columns), grid.dtype)
    scales: tuple[int, ...] = columns // LOW_GROUP + LOW_HEAD, rows
    dtype = "uint8"
    if kind == "int4":
        scales, dtype = (columns // group_of(columns), rows, 2), "bfloat16"
    elif kind == "mxfp4":
        scales, dtype = (columns // MX_BLOCK, rows), _E8M0
    return (name, values, "uint8"), (name + SCALE, scales, dtype)


def factored_sizes(rows: int, columns: int) -> tuple[int, int]:
    """Rank and kept columns of a factored matrix: a 24th of the shorter side and a tenth of the columns, rounded up.

    That is rank 32 in the matrices of 768 x 3072 of MC-SMoE's paper.
    """
    return -(-min(rows, columns) // _RANK_SHARE), -(-columns // _KEPT_SHARE)


def factored_parts(name: str, rows: int, columns: int, dtype: str) -> tuple[Part, ...]:
    """The parts of the weight ``name`` [rows, columns] (rows are outputs) as low rank and kept columns."""
    rank, kept = factored_sizes(rows, columns)
    return (
        (name + LEFT, (rows, rank), dtype),
        (name + RIGHT, (rank, columns), dtype),
        (name + KEPT, (rows, kept), dtype),
        (name + COLUMNS, (kept,), "int32"),
    )
