"""Which stored form a weight matrix can take, and the shapes and number formats of its parts. No torch here.

``quantise.py`` describes the forms and makes them; the plan counts with the same rules, so that bytes planned are bytes
written.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["plain", "int8", "int4", "mxfp4"]
Part = tuple[str, tuple[int, ...], str]
"""Name, shape and number format (torch's name) of one tensor of a record."""

GROUPS = (64, 32)
"""Columns that share a scale in int4: the first of these that divides the columns."""

TILES = (64, 32, 16)
"""Rows of a tile in int4 and mxfp4: the first of these that divides the rows."""

MX_BLOCK = 32
"""Columns that share a scale in mxfp4."""

UP, DOWN = "gate_up_proj", "down_proj"
"""The two weight matrices of a gated expert: gate and up rows together, and down rows."""

SCALE = ".scale"
"""What the name of a quantised weight's scales has behind the name of the weight."""

_E8M0 = "float8_e8m0fnu"
_KIND_OF_FORMATS: dict[tuple[str, str], Kind] = {
    ("int8", "bfloat16"): "int8",
    ("uint8", "bfloat16"): "int4",
    ("uint8", _E8M0): "mxfp4",
}
"""Number formats of a quantised weight's values and scales -> its form."""

LEFT, RIGHT, KEPT, COLUMNS = ".left", ".right", ".kept", ".columns"
"""What the names of a factored weight's parts have behind the name of the weight (``factored.py``)."""

_RANK_SHARE = 24
"""Of the shorter side of a matrix, the part that is its rank."""
_KEPT_SHARE = 10
"""Of the columns, the part that is kept beside it."""


def first_divisor(sizes: tuple[int, ...], length: int) -> int:
    """The first of ``sizes`` that divides ``length``; 0 where none does."""
    return next((size for size in sizes if length % size == 0), 0)


def group_of(columns: int) -> int:
    """Columns that share a scale in an int4 matrix of ``columns`` columns; 0 where int4 cannot take it."""
    return first_divisor(GROUPS, columns)


def kind_of(values: str, scales: str | None) -> Kind | None:
    """The form of a weight by the number formats (torch's names) of its values and scales; ``plain`` without scales,
    ``None`` for a pair that no form has.
    """
    return "plain" if scales is None else _KIND_OF_FORMATS.get((values, scales))


def is_packed(kind: Kind | None) -> bool:
    """Whether a byte of the values holds two numbers."""
    return kind in ("int4", "mxfp4")


def best_kind(rows: int, columns: int, wished: Kind) -> Kind:
    """``wished``, or where it cannot take a matrix of this shape: int8 for int4, plain for mxfp4, whose numbers stay
    what they are.
    """
    if wished == "mxfp4" and (columns % MX_BLOCK or not first_divisor(TILES, rows)):
        return "plain"
    if wished == "int4" and not (first_divisor(TILES, rows) and group_of(columns)):
        return "int8"
    return wished


def quantised_parts(name: str, rows: int, columns: int, kind: Kind) -> tuple[Part, Part]:
    """Values and scales of the weight ``name`` [rows, columns] (rows are outputs) in the form ``kind``."""
    if kind == "int8":
        return (name, (rows, columns), "int8"), (name + SCALE, (rows,), "bfloat16")
    if kind == "int4":
        groups = columns // group_of(columns)
        return (
            (name, (rows, columns // 2), "uint8"),
            (name + SCALE, (groups, rows, 2), "bfloat16"),
        )
    if kind == "mxfp4":
        return (
            (name, (rows, columns // 2), "uint8"),
            (name + SCALE, (columns // MX_BLOCK, rows), _E8M0),
        )
    raise ValueError(f"{kind} is no quantised form")


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
