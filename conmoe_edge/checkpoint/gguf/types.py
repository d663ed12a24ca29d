"""GGML's number formats, as the ``gguf`` library knows them, and their expansion through it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGML's name of a format that torch has -> torch's name."""


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A format: its name (``Q4_K``), the numbers of a block along a row, and the bytes of one."""

    name: str
    block: int
    block_bytes: int


@cache
def type_numbered(number: int) -> GgmlType | None:
    """The type with this number in a file; ``None`` where the library does not know it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        found = GGMLQuantizationType(number)
    except ValueError:
        return None
    return GgmlType(found.name, *GGML_QUANT_SIZES[found])


@cache
def can_expand(name: str) -> bool:
    """Whether the library turns blocks of the type ``name`` into floats."""
    kind = _numbered(name)
    one = np.zeros((1, kind.block_bytes), np.uint8)
    try:
        expand_blocks(one, name)
    except NotImplementedError:
        return False
    return True


def expand_blocks(data: np.ndarray, name: str) -> np.ndarray:
    """Rows of a tensor as floats.

    Args:
        data: uint8 [R, bytes of a row].
        name: of the type.

    Returns:
        float32 [R, C].
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if name in ("F32", "F16"):
        return data.view(np.float32 if name == "F32" else np.float16).astype(np.float32, copy=False)
    return dequantize(data, GGMLQuantizationType[name])


def _numbered(name: str) -> GgmlType:
    from gguf.constants import GGMLQuantizationType

    found = type_numbered(int(GGMLQuantizationType[name]))
    assert found is not None
    return found
