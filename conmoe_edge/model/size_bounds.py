"""What the headers of the weights say about the sizes a config may name, before anything is built from it.

A config of a hundred bytes can ask for a thousand million layers. Every number of a checkpoint's config that counts
something is in some way the size of a tensor or an index in a tensor's name, so the headers bound them all. The bounds
here are loose on purpose: they keep what follows small. Whether the sizes are right is decided afterwards, by
comparing every tensor (``agreement.py``).

No torch here, nothing is allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from conmoe_edge.checkpoint.package.dense_names import own_shapes
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.model.config_json import says, values_of

Shapes = Mapping[str, tuple[int, ...]]

_SLACK = 4
_LEAST_LAYERS = 1024
_LEAST = 1 << 20
"""Below these nothing that is built or counted is large."""
_LARGEST = 1 << 62

# Limits, identities and factors: they make nothing larger.
_COUNTS_NOTHING = re.compile(
    r"token|position|theta|rope|window|length|len$|seq|context|chunk|param|version|seed|scal|factor|base|period|ids?$"
)
_COUNTS_LAYERS = re.compile(r"layers?$")
_INDEX = re.compile(r"(?<=\.)\d{1,9}(?=\.)")


@dataclass(frozen=True, slots=True)
class SizeBounds:
    """Attributes:
    tensors: how many there are.
    numel: numbers that they hold together.
    largest: the largest dimension of a tensor.
    indices: one more than the largest index in a tensor's name (layers, experts).
    """

    tensors: int
    numel: int
    largest: int
    indices: int

    @classmethod
    def of(cls, shapes: Shapes) -> SizeBounds:
        """What these tensors show."""
        return cls._of(shapes.keys(), shapes.values())

    @classmethod
    def _of(cls, names: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> SizeBounds:
        tensors = numel = largest = indices = 0
        for shape in shapes:
            tensors += 1
            count = 1
            for size in shape:
                count *= size
                largest = max(largest, size)
            numel += count
        for name in names:
            for index in _INDEX.findall(name):
                indices = max(indices, int(index) + 1)
        return cls(tensors, numel, largest, indices)

    def check(self, where: Path, config: Mapping[str, Any]) -> None:
        """Refuse a number in ``config`` that is larger than anything in the headers.

        Raises:
            CheckpointError: names the field.
        """
        layers = max(_SLACK * self.indices, _LEAST_LAYERS)
        others = max(_SLACK * max(self.largest, self.indices, self.tensors), _LEAST)
        for path, value, _ in values_of(config):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            field = path.rsplit(".", 1)[-1].lower()
            if field.endswith("_limit") and isinstance(value, float):
                bound = math.inf  # "no limit" is infinity, or the largest number that there is
            elif "rope" in path or _COUNTS_NOTHING.search(field):
                bound = _LARGEST
            else:
                bound = layers if _COUNTS_LAYERS.search(field) else others
            if abs(value) > bound:
                raise says(where, path, value, self._why(field))

    def _why(self, field: str) -> str:
        if _COUNTS_LAYERS.search(field):
            return f"the names of the weights go to index {max(self.indices - 1, 0)}"
        return f"the largest dimension of its {self.tensors} tensors is {self.largest}"


def bounds_in(folder: Path) -> SizeBounds:
    """The bounds of the model or package in a local folder.

    Raises:
        CheckpointError: its headers, or its manifest, are damaged.
    """
    index = CheckpointIndex.open(folder)
    packed = (folder / MANIFEST_NAME).is_file()
    return bounds_of(index, load_manifest(folder) if packed else None)


def bounds_of(index: CheckpointIndex, manifest: Manifest | None) -> SizeBounds:
    """The bounds of a model, or of a package with its ``manifest``, whose headers are read already."""
    own = SizeBounds.of(own_shapes(index.tensors))
    if manifest is None:
        return own
    # The experts of a package are records; what they hold, and how many slots lead to them, is in its manifest.
    slots = manifest.slots
    held = SizeBounds.of(
        {
            f".{number}.{part.name}": part.shape
            for number, layout in enumerate(manifest.layouts)
            for part in layout.parts
        }
    )
    experts = max((len(row) for row in slots.values()), default=0)
    return SizeBounds(
        tensors=own.tensors + len(manifest.prototypes),
        numel=own.numel + held.numel * sum(len(row) for row in slots.values()),
        largest=max(own.largest, held.largest, experts),
        indices=max(own.indices, experts, max(slots, default=-1) + 1),
    )
