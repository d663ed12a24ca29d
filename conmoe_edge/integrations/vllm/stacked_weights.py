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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.checkpoint.package.opened_package import open_package as open_files
from conmoe_edge.checkpoint.package.prototype_reader import PrototypeReader
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.integrations.vllm.layer_stacks import (
    LayerStack,
    NotServable,
    check_servable,
    layer_stacks,
)


class Package:
    """An opened package: its stacks, and its prototypes one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = open_files(folder).manifest
        check_servable(folder, self.manifest)
        self.stacks: dict[int, LayerStack] = layer_stacks(self.manifest)
        self._prototypes = PrototypeReader(folder, self.manifest)
        self._constants: dict[int, Tensor] | None = None

    def expert(self, prototype: ExpertId, dtype: torch.dtype) -> dict[str, Tensor]:
        """``gate_up_proj`` [2I, H] and ``down_proj`` [H, I] of a prototype, in ``dtype``."""
        return self._prototypes.parts(prototype, dtype, transposed=False)

    def constants(self, layer: int) -> Tensor | None:
        """[n, H] fp32, or ``None`` where no slot of the layer has one."""
        if self._constants is None:
            maps = SlotMap.of_manifest(self.manifest)
            self._constants = read_constants(self.folder / CONSTANTS_FILE, maps)
        return self._constants.get(layer)


@dataclass(frozen=True, slots=True)
class RankSlots:
    """A layer's map for the part of its stack that one rank holds.

    Attributes:
        target: [E] int64, position in the rank's part; -1 where the slot's prototype is not in it.
        factor: [E] fp32, of a slot's gate; 0 where ``target`` is -1.
        weighs: whether any factor is other than 1.
    """

    target: Tensor
    factor: Tensor
    weighs: bool

    @classmethod
    def of(cls, slots: SlotMap, held: range) -> RankSlots:
        """Render ``slots``, whose prototype numbers are positions in the stack; ``held`` are those of the rank."""
        mine = slots.renumbered({place: number for number, place in enumerate(held)})
        factors = [
            0.0 if number == NONE else scale
            for number, scale in zip(mine.targets, mine.scales, strict=True)
        ]
        return cls(
            torch.tensor(mine.targets, dtype=torch.int64),
            torch.tensor(factors, dtype=torch.float32),
            any(factor != 1.0 for factor in factors),
        )


def padded_constants(slots: SlotMap, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's constants [C + 1, H], the last of which is zero, and the row of every slot [E] int64."""
    row_of = [len(rows) if row == NONE else row for row in slots.constants]
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), torch.tensor(row_of)


def map_choice(
    target: Tensor, factor: Tensor | None, slots: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """[T, K] router slots and gates -> positions in the rank's part (int64) and weights.

    Slots of a token that lead to one prototype stay apart: the kernel's outputs add up. ``factor`` of ``None``: all 1.
    """
    weights = gates if factor is None else gates * factor[slots]
    return target[slots].clamp(min=0), weights


def gated_sum(constants: Tensor, constant_of: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    """[T, K] router slots and gates -> [T, H], the constants of ``padded_constants`` times their gates."""
    weights = gates.new_zeros(len(gates), len(constants))
    weights.scatter_add_(1, constant_of[slots], gates)
    return weights.to(constants.dtype) @ constants


def package_folder(model_name: str) -> Path:
    """The folder of the package that vLLM was started with, checked before any worker is started.

    vLLM reads the dense weights by itself: those that the index names, which have been checked, from a folder in which
    there are no others and no pickle.

    Raises:
        NotServable: it is no folder, or a package that cannot be served.
        PackageError: the package is damaged.
    """
    folder = Path(model_name)
    if not folder.is_dir():
        raise NotServable(
            f"{model_name} is not a folder.",
            "the prototypes of a package are read from its own files",
            f"hf download {model_name} --local-dir DIR, and serve DIR",
        )
    folder = folder.resolve()
    open_package(folder)
    return folder


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
