"""One expert as one run of bytes: where each of its tensors begins, and how long the whole is. No torch here.

The plan counts with what packages are written with: ``forms.py`` for a matrix, this file for a record. Parts start
64-aligned (vector loads, a cache line). Records of 256 KiB and more are multiples of 4096 bytes (direct reads,
page-sized copies); smaller ones are multiples of 64, because half a page of each would be several hundredths of all.
"""

from __future__ import annotations

from collections.abc import Sequence

from conmoe_edge.checkpoint.format.dtypes import nbytes_of
from conmoe_edge.checkpoint.format.forms import DOWN, RIGHT, SCALE, Part, columns_of, kind_of
from conmoe_edge.checkpoint.format.manifest import RecordLayout, RecordPart
from conmoe_edge.units import round_up

PART_ALIGNMENT = 64
PAGE = 4096
SMALL_RECORD = 256 << 10
"""Below this many bytes records share pages."""


def record_alignment(nbytes: int) -> int:
    """What the size and the place of a record of ``nbytes`` bytes are multiples of."""
    return PART_ALIGNMENT if nbytes < SMALL_RECORD else PAGE


def make_layout(parts: Sequence[Part], precision: str = "source") -> RecordLayout:
    """Lay out the parts one after another, in the order given.

    Raises:
        ValueError: two parts have the same name.
    """
    if len({name for name, _, _ in parts}) != len(parts):
        raise ValueError("two parts of a record have the same name")
    placed: list[RecordPart] = []
    end = 0
    for name, shape, dtype in parts:
        offset = round_up(end, PART_ALIGNMENT)
        nbytes = nbytes_of(dtype, shape)
        placed.append(RecordPart(name, tuple(shape), dtype, offset, nbytes))
        end = offset + nbytes
    return RecordLayout(precision, tuple(placed), round_up(max(end, 1), record_alignment(end)))


def neurons(down: Sequence[int], transposed: bool) -> int:
    """Neurons of an expert: the inputs of its down projection, whose shape ends in [out, in], or in [in, out] where
    it is ``transposed``.
    """
    return down[-2 if transposed else -1]


def expert_width(layout: RecordLayout, transposed: bool = False) -> int:
    """Neurons of the experts in records of this layout; 0 where its parts do not tell.

    ``transposed`` is the module's; a quantised or factored weight is [out, in] always.
    """
    parts = {part.name: part for part in layout.parts if len(part.shape) == 2}
    stored = {part.name: (part.dtype, part.shape) for part in layout.parts}
    if DOWN + RIGHT in parts:
        return neurons(parts[DOWN + RIGHT].shape, False)
    if DOWN not in parts:
        return 0
    kind = kind_of(stored[DOWN], stored.get(DOWN + SCALE))
    if kind is None or kind == "plain":
        return neurons(parts[DOWN].shape, transposed)
    return columns_of(kind, parts[DOWN].shape)
