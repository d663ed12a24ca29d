"""What the experts of one MoE layer gave, as vectors: the sum and the sum of squares of each one's outputs.

Over the tokens whose router chose the expert, unweighted, padding left out. Accumulators are float64
on the host, 2 * E * H numbers; they wait in the run's work folder until the layer's scope is decided.

Raises ``NoSpace``; ``CheckpointError`` where a file of an earlier run is damaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.compress.work.work_folder import load_as, save_tensors


@dataclass(frozen=True, slots=True)
class OutputVectors:
    """``sums`` [E, H] and ``squares`` [E, H] float64: sum of f and of f * f over ``counts`` [E] tokens."""

    sums: Tensor
    squares: Tensor
    counts: Tensor

    def means(self) -> Tensor:
        """[E, H] float64; zeros for an expert that no token chose."""
        return self.sums / self._divisor()

    def deviations(self) -> Tensor:
        """[E, H] float64: the standard deviation of every output dimension; zeros for an expert without tokens."""
        variance = self.squares / self._divisor() - self.means().square()
        return variance.clamp(min=0.0).sqrt()

    def _divisor(self) -> Tensor:
        return self.counts.clamp(min=1).unsqueeze(1).double()

    def save(self, path: Path) -> None:
        """Keep them in the work folder."""
        named = {"counts": self.counts, "squares": self.squares, "sums": self.sums}
        save_tensors(path, named)

    @classmethod
    def load(cls, path: Path) -> OutputVectors:
        """What ``save`` kept."""
        return load_as(cls, path)


class VectorTracker:
    """Accumulates ``OutputVectors`` while a layer runs."""

    def __init__(self, experts: int, hidden: int) -> None:
        self._sums = torch.zeros(experts, hidden, dtype=torch.float64)
        self._squares = torch.zeros(experts, hidden, dtype=torch.float64)
        self._counts = torch.zeros(experts, dtype=torch.int64)

    def add(self, expert: int, outputs: Tensor, keep: Tensor | None) -> None:
        """outputs [n, H] of one expert, not yet weighted; ``keep`` [n] marks real tokens."""
        if keep is not None:
            outputs = outputs[keep]
        values = outputs.double()
        self._sums[expert] += values.sum(0).cpu()
        self._squares[expert] += values.square().sum(0).cpu()
        self._counts[expert] += len(outputs)

    def result(self) -> OutputVectors:
        """What was seen so far."""
        return OutputVectors(self._sums, self._squares, self._counts)
