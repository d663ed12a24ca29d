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
from conmoe_edge.checkpoint.format.record_check import RecordCheck
from conmoe_edge.checkpoint.format.records import decode, view
from conmoe_edge.checkpoint.package.record_headers import record_index, record_name
from conmoe_edge.checkpoint.package.small_tensors import damaged
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader


class PrototypeReader:
    """Opens the prototype files of the package in ``folder``. One descriptor a file, until ``close``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._layouts = manifest.layouts
        self._entries = {entry.id: entry for entry in manifest.prototypes}
        self._checks = [RecordCheck(layout) for layout in manifest.layouts]
        self._reader = ShardReader(record_index(folder, manifest))

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
        name = record_name(prototype)
        record = self._reader[name][...]
        why = self._checks[entry.layout].wrong(record)
        if why:
            raise damaged(self._folder / entry.file, f"{why} in the record {name}")
        parts = decode(view(layout, record), dtype, transposed)
        return {name: part.to(dtype) for name, part in parts.items()}

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
