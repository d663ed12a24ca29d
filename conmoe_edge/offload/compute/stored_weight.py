"""The values and scales of a module's weight as a matrix in its stored form. Memory: nothing, they are views."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.forms import Kind, quantised_parts
from conmoe_edge.checkpoint.format.quantise import Matrix, stored
from conmoe_edge.errors import UsageError


def room_for(rows: int, columns: int, kind: Kind) -> tuple[nn.Parameter, Tensor]:
    """Values and scales of a quantised ``kind`` on the meta device."""
    values, scales = [
        torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for _, shape, dtype in quantised_parts("weight", rows, columns, kind)
    ]
    return nn.Parameter(values, requires_grad=False), scales


class StoredWeight:
    """How a weight is stored, and the matrix that was made of its tensors last."""

    def __init__(self, kind: Kind) -> None:
        """``plain``, or a form that ``quantised_parts`` knows."""
        self.kind: Kind = kind
        self.place = 0
        self._matrix: Matrix | None = None

    def known(self, values: Tensor) -> Matrix | None:
        """The matrix, where the values lie as they did when it was made."""
        return self._matrix if self.place == values.data_ptr() else None

    def matrix(self, values: Tensor, scales: Tensor | None) -> Matrix:
        """The weights as they lie now; they may have been moved since the last call.

        Raises:
            UsageError: others were put in their place.
        """
        found = self.known(values)
        if found is None:
            wanted = {"plain": values.dtype, "int8": torch.int8}.get(self.kind, torch.uint8)
            if values.dtype != wanted:
                raise UsageError(
                    f"A weight in {self.kind} was replaced by one in {values.dtype}.",
                    "its scales belong to the numbers that the package has",
                    "Load the original checkpoint to change its weights",
                )
            self.place = values.data_ptr()
            scales = None if scales is None else scales.detach()
            self._matrix = found = stored(self.kind, values.detach(), scales)
        return found
