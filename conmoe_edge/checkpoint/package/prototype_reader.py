"""The prototypes of a package by their ids, one at a time, for readers outside the runtime.

The runtime reads records into cache slots (``offload/storage/record_store.py``); an export wants one expert's tensors
in a floating-point format. Peak memory: one record, and the expert expanded. Raises
``PackageError`` for a package whose files do not hold what its manifest says, ``CheckpointError`` where a read fails.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest, RecordLayout
from conmoe_edge.checkpoint.format.records import decode, view
from conmoe_edge.checkpoint.tensors.tensor_index import index_files
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.errors import PackageError


class PrototypeReader:
    """Opens the prototype files of the package in ``folder``. One descriptor a file, until ``close``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._layouts = manifest.layouts
        self._entries = {entry.id: entry for entry in manifest.prototypes}
        files = sorted({entry.file for entry in manifest.prototypes})
        index = index_files(folder, files)
        self._reader = ShardReader(index)
        self._places = {(one.file, one.offset): one for one in index.tensors.values()}

    def layout(self, prototype: ExpertId) -> RecordLayout:
        """How a prototype is stored."""
        return self._layouts[self._entries[prototype].layout]

    def parts(
        self, prototype: ExpertId, dtype: torch.dtype, *, transposed: bool
    ) -> dict[str, Tensor]:
        """One prototype's tensors by parameter name, in ``dtype`` and as its module keeps them ([in, out] where
        ``transposed``); int8 and int4 weights are expanded.
        """
        entry = self._entries[prototype]
        layout = self._layouts[entry.layout]
        place = self._places.get((entry.file, entry.offset))
        if place is None or place.nbytes != layout.nbytes:
            raise PackageError(
                f"The prototypes in {self._folder / entry.file} cannot be read.",
                f"there is no record of {list(prototype)} where the manifest says",
                "Write the package again: conmoe-edge fit MODEL --out DIR --overwrite",
            )
        record = self._reader.read(place, 0, layout.nbytes)
        parts = decode(view(layout, record), dtype, transposed)
        return {name: part.to(dtype) for name, part in parts.items()}

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
