"""``ShardReader`` over a model on the hub: the same tensors, and bytes that come over the network when asked for."""

from __future__ import annotations

import torch

from conmoe_edge.checkpoint.sources.hub_ranges import HubRanges
from conmoe_edge.checkpoint.sources.source_scratch import SourceScratch
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, TensorEntry
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader


class RemoteReader(ShardReader):
    """The tensors of a checkpoint on the hub by name.

    Args:
        index: its headers.
        ranges: where bytes come from.
        scratch: where they wait between; without one, every read goes over the network.
    """

    def __init__(
        self, index: CheckpointIndex, ranges: HubRanges, scratch: SourceScratch | None = None
    ) -> None:
        super().__init__(index)
        self._ranges = ranges
        self._scratch = scratch

    def read(self, entry: TensorEntry, start: int, nbytes: int) -> torch.Tensor:
        """As ``ShardReader.read``; raises the errors of ``HubRanges`` too."""
        if self._closed:
            raise ValueError("the reader is closed")
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes:
            view = buffer.numpy().data
            if self._scratch is not None:
                self._scratch.read_into(entry, start, view)
            else:
                self._ranges.read_into(entry.file, entry.offset + start, view)
        return buffer
