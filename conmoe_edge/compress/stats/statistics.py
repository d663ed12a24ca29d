"""What calibration saw of the routed experts of a layer: sums of numbers, and of output vectors, per expert.

ConMoE, section 3.2, "contribution":

    a_e = (1 / N_e) * sum over t in D_e of g_e(t) * ||f_e(h_t)||_2,    a_e = 0 where N_e = 0

with D_e the tokens whose router chose e, N_e their number, g_e(t) the coefficient with which the model multiplies the
expert's output (after top-k, renormalisation, scaling), f_e(h_t) the output before it. Padding is not counted.

The other sums are for the one-shot pruning scores (``methods/pruning.py``). ``OutputVectors`` are for methods that need
means and deviations of the outputs themselves, unweighted; they wait in the work folder until the scope is decided.

Accumulators are float64 on the host: 6 numbers an expert, and 2 * H where vectors are wanted. Raises ``NoSpace``;
``CheckpointError`` where a file of an earlier run is damaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.compress.work.work_folder import load_as, save_tensors


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Sums over the calibration tokens of one MoE layer, one entry an expert.

    With g the size of a routing weight (some routers scale experts by trained numbers, which may be below zero):
    ``weighted_norms`` = sum of g * ||f||, ``gates`` = sum of g, ``counts`` = N_e, ``norms`` = sum of ||f||,
    ``squared_norms`` = sum of ||f||^2, ``energies`` = sum of g^2 * ||f||^2.
    """

    weighted_norms: tuple[float, ...]
    gates: tuple[float, ...]
    counts: tuple[int, ...]
    norms: tuple[float, ...] = ()
    squared_norms: tuple[float, ...] = ()
    energies: tuple[float, ...] = ()

    def contribution(self) -> Tensor:
        """[E] float64: a_e of every expert."""
        sums = torch.tensor(self.weighted_norms, dtype=torch.float64)
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return torch.where(counts > 0, sums / counts.clamp(min=1), torch.zeros_like(sums))

    def to_json(self) -> dict[str, Any]:
        """Plain lists; floats survive JSON exactly."""
        return {
            "weighted_norms": list(self.weighted_norms),
            "gates": list(self.gates),
            "counts": list(self.counts),
            "norms": list(self.norms),
            "squared_norms": list(self.squared_norms),
            "energies": list(self.energies),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LayerStatistics:
        """The inverse of ``to_json``."""
        return cls(**{name: tuple(sums) for name, sums in value.items()})


class StatisticsTracker:
    """Accumulates ``LayerStatistics`` while a layer runs."""

    def __init__(self, experts: int) -> None:
        self._weighted = torch.zeros(experts, dtype=torch.float64)
        self._gates = torch.zeros(experts, dtype=torch.float64)
        self._norms = torch.zeros(experts, dtype=torch.float64)
        self._squared = torch.zeros(experts, dtype=torch.float64)
        self._energies = torch.zeros(experts, dtype=torch.float64)
        self._counts = torch.zeros(experts, dtype=torch.int64)

    def add(self, expert: int, gates: Tensor, outputs: Tensor, keep: Tensor | None) -> None:
        """Count the tokens that one expert got.

        Args:
            expert: its number in the layer.
            gates: [n] routing weights.
            outputs: [n, H] what the expert gave, not yet weighted.
            keep: [n] bool, false at padding; ``None`` where there is none.
        """
        weights = gates.float().abs()
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
        products = weights * norms
        count = weights.numel()
        if keep is not None:
            products = products[keep]
            weights, norms = weights[keep], norms[keep]
            count = int(keep.sum())
        self._weighted[expert] += products.double().sum().cpu()
        self._gates[expert] += weights.double().sum().cpu()
        self._norms[expert] += norms.double().sum().cpu()
        self._squared[expert] += norms.double().square().sum().cpu()
        self._energies[expert] += products.double().square().sum().cpu()
        self._counts[expert] += count

    def result(self) -> LayerStatistics:
        """What was seen so far."""
        return LayerStatistics(
            tuple(self._weighted.tolist()),
            tuple(self._gates.tolist()),
            tuple(self._counts.tolist()),
            tuple(self._norms.tolist()),
            tuple(self._squared.tolist()),
            tuple(self._energies.tolist()),
        )


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
