"""Names of number formats: the code in a safetensors header, the name in torch, the width in bits. No torch here
(``torch_dtype.py`` has the way there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Width of one number of each format that a safetensors header may name."""

TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
"""Code in the header -> name in torch. Formats narrower than a byte have none."""

CODES = {name: code for code, name in TORCH_NAMES.items()}
"""Name in torch -> code in the header."""

PLAIN = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
"""Codes that the tensors of a plain checkpoint have; any other one is of a number of a quantised weight."""


def itemsize(torch_name: str) -> int:
    """Bytes of one number of ``torch_name``, ``2`` for ``"bfloat16"``.

    Raises:
        KeyError: the name is none of ``CODES``.
    """
    return BITS[CODES[torch_name]] // 8


def nbytes_of(torch_name: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor; ``KeyError`` as in ``itemsize``."""
    return math.prod(shape) * itemsize(torch_name)
