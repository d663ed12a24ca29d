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

SCALE = ".scale"
"""What the name of a quantised weight's scales has behind the name of the weight."""

KIND_OF_VALUES: dict[str, Kind] = {"int8": "int8", "uint8": "int4"}
"""Number format of a quantised weight's values -> its form."""


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
