"""The reassignment map of a layer for torch: a ``SlotMap`` as tensors on one device, with the constants' rows.

Used wherever torch computes with prototypes: the runtime's torch path and the streamed models of a fit. Memory: 20
bytes a router slot, and the constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.model.experts import Routes, add_constants, merge_routes


@dataclass(frozen=True, slots=True)
class SlotTensors:
    """A layer's map on one device.

    Attributes:
        slot_map: what was rendered.
        targets: [E] int64, prototype numbers, -1 where a slot has none.
        scales: [E] fp32, or ``None`` where every scale is 1.
        constants: [C, H] fp32, or ``None`` where no slot has one.
        constant_of: [E] int64, row of ``constants``, -1 where a slot has none; ``None`` with ``constants``.
    """

    slot_map: SlotMap
    targets: Tensor
    scales: Tensor | None
    constants: Tensor | None
    constant_of: Tensor | None

    @classmethod
    def of(cls, slot_map: SlotMap, constants: Tensor | None, device: torch.device) -> SlotTensors:
        """Render ``slot_map``.

        Args:
            slot_map: the layer's map.
            constants: [C, H] fp32; ignored where no slot names a row.
            device: where router outputs are.

        Raises:
            ValueError: the map names a row that ``constants`` does not have.
        """
        rows = 0 if constants is None else len(constants)
        if slot_map.constant_rows > rows:
            raise ValueError(
                f"layer {slot_map.layer} has {rows} constants, its slots name row {slot_map.constant_rows - 1}"
            )
        # A default device may be set around this call, as transformers does while it builds a model.
        targets = torch.tensor(slot_map.targets, dtype=torch.int64, device=device)
        scales = torch.tensor(slot_map.scales, dtype=torch.float32, device=device)
        constant_of = torch.tensor(slot_map.constants, dtype=torch.int64, device=device)
        kept = constants if slot_map.has_constants else None
        return cls(
            slot_map=slot_map,
            targets=targets,
            scales=scales if slot_map.is_scaled else None,
            constants=None if kept is None else kept.to(device=device, dtype=torch.float32),
            constant_of=None if kept is None else constant_of,
        )

    def to(self, device: torch.device) -> SlotTensors:
        """The same map on another device; itself where it is there already."""
        if self.targets.device == device:
            return self
        return SlotTensors.of(self.slot_map, self.constants, device)

    def routes(self, slots: Tensor, gates: Tensor) -> Routes:
        """[T, K] router slots and gates -> which prototype sees which tokens (``merge_routes``)."""
        return merge_routes(slots, gates, self.targets, self.scales)

    def add_constants(self, total: Tensor, slots: Tensor, gates: Tensor) -> None:
        """Add the gated constants to ``total`` [T, H], slot by slot."""
        if self.constants is not None and self.constant_of is not None:
            add_constants(total, slots, gates, self.constants, self.constant_of)
