"""llama.cpp's quantised types: their names, and how many bytes a matrix takes in them. Arithmetic only.

A file type (``Q4_K_M``) is a mixture that llama.cpp decides tensor by tensor; ``FILE_TYPES`` has what it gives to most
matrices, to the down projections of experts, and to the output head. Types with blocks of 256 columns are replaced
where rows are no multiple of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """``bits`` a number, in blocks of ``block`` columns; ``otherwise`` is taken for rows that are no whole blocks."""

    bits: float
    block: int
    otherwise: str = "F16"


FORMATS: Mapping[str, Format] = {
    "F16": Format(16, 1),
    "Q8_0": Format(8.5, 32),
    "Q6_K": Format(6.5625, 256, "Q8_0"),
    "Q5_K": Format(5.5, 256, "Q5_1"),
    "Q5_1": Format(6, 32),
    "Q5_0": Format(5.5, 32),
    "Q4_K": Format(4.5, 256, "Q5_0"),
    "Q4_1": Format(5, 32),
    "Q4_0": Format(4.5, 32),
    "IQ4_NL": Format(4.5, 32),
    "IQ4_XS": Format(4.25, 256, "IQ4_NL"),
    "MXFP4": Format(4.25, 32),
    "Q3_K": Format(3.4375, 256, "Q4_0"),
    "IQ3_S": Format(3.4375, 256, "IQ4_NL"),
    "IQ3_XXS": Format(3.0625, 256, "IQ4_NL"),
    "Q2_K": Format(2.625, 256, "Q4_0"),
    "IQ2_S": Format(2.5625, 256, "IQ4_NL"),
    "IQ2_XS": Format(2.3125, 256, "IQ4_NL"),
    "IQ2_XXS": Format(2.0625, 256, "IQ4_NL"),
    "IQ1_M": Format(1.75, 256, "IQ4_NL"),
    "IQ1_S": Format(1.5625, 256, "IQ4_NL"),
}


@dataclass(frozen=True, slots=True)
class FileType:
    """A mixture.

    Attributes:
        most: the format of most matrices.
        down: that of the down projections in ``share`` of the layers.
        share: see ``down``.
        head: that of the output head.
        dense: that of matrices outside the experts, where it is not ``most``.
    """

    most: str
    down: str
    share: float = 1.0
    head: str = "Q6_K"
    dense: str = ""


FILE_TYPES: Mapping[str, FileType] = {
    "Q8_0": FileType("Q8_0", "Q8_0", head="Q8_0"),
    "Q6_K": FileType("Q6_K", "Q6_K"),
    "Q5_K_M": FileType("Q5_K", "Q6_K", 0.5),
    "Q5_K_S": FileType("Q5_K", "Q5_K"),
    "Q5_1": FileType("Q5_1", "Q5_1"),
    "Q5_0": FileType("Q5_0", "Q5_1", 0.125),
    "Q4_K_M": FileType("Q4_K", "Q6_K", 0.5),
    "Q4_K_S": FileType("Q4_K", "Q5_K", 0.125),
    "Q4_1": FileType("Q4_1", "Q4_1"),
    "Q4_0": FileType("Q4_0", "Q4_1", 0.125),
    "IQ4_NL": FileType("IQ4_NL", "IQ4_NL"),
    "IQ4_XS": FileType("IQ4_XS", "IQ4_XS"),
    "MXFP4_MOE": FileType("MXFP4", "MXFP4", head="Q8_0", dense="Q8_0"),
    "Q3_K_L": FileType("Q3_K", "Q5_K"),
    "Q3_K_M": FileType("Q3_K", "Q4_K"),
    "Q3_K_S": FileType("Q3_K", "Q3_K"),
    "IQ3_M": FileType("IQ3_S", "Q4_K", 0.125),
    "IQ3_S": FileType("IQ3_S", "IQ3_S"),
    "IQ3_XS": FileType("IQ3_XXS", "IQ3_S"),
    "IQ3_XXS": FileType("IQ3_XXS", "IQ3_XXS", head="Q5_K"),
    "Q2_K": FileType("Q2_K", "Q3_K"),
    "Q2_K_S": FileType("Q2_K", "Q4_K", 0.125),
    "IQ2_M": FileType("IQ2_S", "IQ3_S", 0.125, "Q5_K"),
    "IQ2_S": FileType("IQ2_XS", "IQ3_S", 0.125, "Q5_K"),
    "IQ2_XS": FileType("IQ2_XS", "Q2_K", 0.125, "Q5_K"),
    "IQ2_XXS": FileType("IQ2_XXS", "Q2_K", 0.125, "Q5_K"),
    "IQ1_M": FileType("IQ1_M", "Q2_K", 0.125, "Q5_K"),
    "IQ1_S": FileType("IQ1_S", "Q2_K", 0.125, "Q5_K"),
}
"""What a file can be quantised to, from large to small."""


def matrix_bytes(name: str, rows: int, columns: int) -> int:
    """Bytes of [rows, columns] in a format of ``FORMATS``, or in what takes its place for such columns."""
    found = FORMATS[name]
    if columns % found.block:
        return matrix_bytes(found.otherwise, rows, columns)
    return round(rows * columns * found.bits / 8)
