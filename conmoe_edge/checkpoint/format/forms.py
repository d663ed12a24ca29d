"""Which stored form a weight matrix can take, and the shapes and number formats of its parts. No torch here.

``quantise.py`` describes the forms and makes them; the plan counts with the same rules, so that bytes planned are bytes
written.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["plain", "int8", "int4"]
Part = tuple[str, tuple[int, ...], str]
"""Name, shape and number format (torch's name) of one tensor of a record."""

GROUPS = (64, 32)
"""Columns that share a scale in int4: the first of these that divides the columns."""

TILES = (64, 32, 16)
"""Rows of a tile in int4: the first of these that divides the rows."""

UP, DOWN = "gate_up_proj", "down_proj"
"""The two weight matrices of a gated expert: gate and up rows together, and down rows."""

SCALE = ".scale"
"""What the name of a quantised weight's scales has behind the name of the weight."""

KIND_OF_VALUES: dict[str, Kind] = {"int8": "int8", "uint8": "int4"}
"""Number format of a quantised weight's values -> its form."""

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


def best_kind(rows: int, columns: int, wished: Kind) -> Kind:
    """``wished``, or int8 where int4 cannot take a matrix of this shape."""
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
