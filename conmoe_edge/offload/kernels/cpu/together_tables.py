"""One token each of several answers, as the operator is told them: where each stands, and what its layer found."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from conmoe_edge.offload.kernels.cpu.attention_tables import (
    AttentionTable,
    Cached,
    LatentTable,
    Positions,
)


class _Place(ctypes.Structure):
    _fields_: ClassVar = [
        *[("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("rotary", ctypes.c_int64)],
        *[(name, ctypes.c_void_p) for name in ("keys", "values")],
        *[(name, ctypes.c_int64) for name in ("key_step", "value_step", "held", "packed")],
    ]


def places_of(
    table: AttentionTable | LatentTable, where: Sequence[tuple[Positions | None, Cached]]
) -> ctypes.Array[_Place]:
    """Position and cache of every token, for a layer with the attention ``table``; they are not kept alive.

    Raises:
        ValueError: a cache or angles that the table does not take, or two tokens of one cache.
    """
    if len({cached.keys for _, cached in where}) != len(where):
        raise ValueError("the operator does not take this: two tokens of one cache")
    found = []
    for positions, cached in where:
        if cached.sizes != table.cache:
            raise ValueError(
                f"the operator does not take this: a cache of {cached.sizes} for {table.cache}"
            )
        found.append(_Place(*table.turning.angles(positions), *cached.arguments))
    return (_Place * len(found))(*found)


@dataclass(frozen=True, slots=True)
class FoundTogether:
    """What a layer found for T tokens.

    Attributes:
        out: bf16 [T, H]; ``None`` where a prototype is not in memory.
        count: different prototypes that were computed with; ``LayerTable.asked`` names them.
        summed, normed: the sums behind the attention and their norms, bf16 [T, H].
        slots, gates: what the router chose, [T, K]; empty without one.
    """

    out: Tensor | None
    count: int
    summed: Tensor
    normed: Tensor
    slots: Tensor
    gates: Tensor
