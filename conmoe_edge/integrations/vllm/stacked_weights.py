"""A package's prototypes as the two stacked weights that vLLM's kernels read: ``w13`` [n, 2I, H], gate over up, and
``w2`` [n, H, I]; of a rank's share only.

Records are read with positioned reads, one at a time, straight from the package's files. int8 and int4 records are
expanded to the model's number format on the way, so they cost memory like bf16 ones. Tensor parallelism cuts the
neurons; prototypes with fewer neurons than the stack, and ranks whose cut does not come out even, are filled up with
zeros, which add nothing.

Peak memory: the two weights, one record, one expanded expert. Raises ``PackageError`` for a damaged package. No vLLM
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.checkpoint.package.manifest_io import verify_package
from conmoe_edge.checkpoint.package.prototype_reader import PrototypeReader
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.integrations.vllm.layer_tables import LayerTable, check_servable, layer_tables


class Package:
    """An opened package: its tables, and its prototypes one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = verify_package(folder)
        check_servable(folder, self.manifest)
        self.tables: dict[int, LayerTable] = layer_tables(self.manifest)
        self._prototypes = PrototypeReader(folder, self.manifest)
        self._constants: dict[int, Tensor] | None = None

    def expert(self, prototype: ExpertId, dtype: torch.dtype) -> dict[str, Tensor]:
        """``gate_up_proj`` [2I, H] and ``down_proj`` [H, I] of a prototype, in ``dtype``."""
        return self._prototypes.parts(prototype, dtype, transposed=False)

    def constants(self, layer: int) -> Tensor | None:
        """[n, H] fp32, or ``None`` where no slot of the layer has one."""
        if not self.tables[layer].has_constants:
            return None
        if self._constants is None:
            self._constants = read_constants(self.folder / CONSTANTS_FILE)
        return self._constants[layer]


@lru_cache(maxsize=4)
def open_package(folder: Path) -> Package:
    """The package in ``folder``; opened once a process."""
    return Package(folder)


def fill(
    package: Package,
    prototypes: Iterable[ExpertId],
    w13: Tensor,
    w2: Tensor,
    *,
    rank: int,
    ranks: int,
    width: int,
) -> None:
    """Read prototypes into the stacked weights of one rank.

    Args:
        package: where they are.
        prototypes: in the order of the stack.
        w13: [n, 2J, H] to fill, on any device: gate in the first J rows, up in the others.
        w2: [n, H, J] to fill.
        rank, ranks: which part of the neurons; ``ranks`` of 1 takes them all.
        width: neurons of the widest prototype, which are what is cut into ranks.
    """
    wide = w2.shape[2]
    part = -(-width // ranks)  # the last rank may get fewer
    for place, prototype in enumerate(prototypes):
        parts = package.expert(prototype, w2.dtype)
        down = parts["down_proj"]  # [H, I]
        neurons = down.shape[1]
        gate, up = parts["gate_up_proj"].split(neurons)  # [I, H] each
        first, last = min(rank * part, neurons), min((rank + 1) * part, neurons)
        held = last - first
        if held < wide:
            w13[place].zero_()
            w2[place].zero_()
        w13[place, :held].copy_(gate[first:last])
        w13[place, wide : wide + held].copy_(up[first:last])
        w2[place, :, :held].copy_(down[:, first:last])
