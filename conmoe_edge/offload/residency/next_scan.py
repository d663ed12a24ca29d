"""What a chunk of a prompt will ask for in the layer that comes next.

A chunk has one token after the other go to K of a layer's prototypes, so it asks for nearly all of them, or, if it is
short, for a part. The part that it asks for in one layer says how it will be in the next one, where the same tokens go
to as many: from ``NEARLY_ALL`` on the next layer's prototypes are read ahead in the order of their numbers, which is
that of the file. What is read without being asked for is read once and costs nobody a byte of memory.

Plain numbers. Memory: a number a prototype of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap

NEARLY_ALL = 0.75
"""A record that is asked for saves its reading while the disk would be idle, one that is not costs as much: three of
four are worth the fourth."""


class NextScan:
    """The prototypes of every MoE layer and of the one after it."""

    def __init__(self, manifest: Manifest) -> None:
        maps = SlotMap.of_manifest(manifest)
        numbers = {layer: one.prototypes for layer, one in maps.items()}
        self._after = {
            layer: (len(numbers[layer]), numbers[after]) for layer, after in pairwise(numbers)
        }

    def after(self, layer: int, asked: int) -> Sequence[int]:
        """What the MoE layer after ``layer`` will be asked for, ascending, where a chunk has asked ``layer`` for so
        many prototypes; nothing where that does not say, and after the last layer.
        """
        count, numbers = self._after.get(layer, (0, ()))
        return numbers if asked >= NEARLY_ALL * count else ()
