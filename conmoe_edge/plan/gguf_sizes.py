"""About how large a model is as a quantised GGUF file, from its anatomy. Arithmetic only.

Matrices count in the formats of ``gguf_types.py``, everything else in fp32. An output head counts also where it is the
embedding, since llama.cpp wants it a second time for most families. Metadata and the vocabulary are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy, ModelAnatomy
from conmoe_edge.plan.gguf_types import FILE_TYPES, FORMATS, FileType, matrix_bytes

SMALLEST_BLOCK = 32
"""Columns: the blocks of llama.cpp's simple formats, and of MXFP4."""

_SIZES = {"float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class GgufSizes:
    """Bytes: ``dense`` outside the routed experts, ``experts`` of one expert in each MoE layer, ``file`` in all."""

    dense: int
    experts: tuple[int, ...]
    file: int


def gguf_sizes(anatomy: ModelAnatomy, kind: str) -> GgufSizes:
    """The sizes of a model as a file of the type ``kind``, one of ``FILE_TYPES``."""
    mixture = FILE_TYPES[kind]
    layers = [layer.experts for layer in anatomy.moe_layers if layer.experts is not None]
    experts = tuple(_expert(one, anatomy.hidden_size, mixture) for one in layers)
    pool = sum(one.count * size for one, size in zip(layers, experts, strict=True))
    dense = _dense(anatomy, mixture)
    return GgufSizes(dense, experts, dense + pool)


def step_of(kind: str, whole: int) -> int:
    """Neurons by which experts of ``whole`` neurons are narrowed: whole blocks of the type."""
    mixture = FILE_TYPES[kind]
    block = max(FORMATS[mixture.most].block, FORMATS[mixture.down].block)
    return block if whole > block else SMALLEST_BLOCK


def _expert(experts: ExpertsAnatomy, hidden: int, mixture: FileType) -> int:
    return sum(_part(part, hidden, experts.width, mixture) for part in experts.parts)


def _part(part: ExpertPart, hidden: int, width: int, mixture: FileType) -> int:
    numel = math.prod(part.shape)
    if part.name.endswith("_bias"):
        return 4 * numel
    if part.name != "down_proj":
        return matrix_bytes(mixture.most, numel // hidden, hidden)
    most, more = (matrix_bytes(name, hidden, width) for name in (mixture.most, mixture.down))
    return round(most + (more - most) * mixture.share)


def _dense(anatomy: ModelAnatomy, mixture: FileType) -> int:
    vocab, hidden = anatomy.vocab_size, anatomy.hidden_size
    size = _SIZES.get(anatomy.dtype, 2)
    rest = anatomy.dense_bytes - vocab * hidden * size
    total = matrix_bytes(mixture.most, vocab, hidden) + matrix_bytes(mixture.head, vocab, hidden)
    for one in anatomy.dense_matrices:
        if one.looked_up:
            continue
        rest -= one.nbytes
        if (one.layer, one.rows) != (None, vocab):
            total += matrix_bytes(mixture.dense or mixture.most, one.rows, one.columns)
    return total + max(0, rest) * 4 // size
