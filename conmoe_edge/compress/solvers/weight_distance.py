"""Normalised parameter distance between the experts of a scope (ConMoE, section 3.2).

    delta_m(e, e') = 2 * ||W_m^e - W_m^e'||_F / (||W_m^e||_F + ||W_m^e'||_F + 2 eps),   m in {gate, up, down}
    d(e, e')       = mean of the delta_m

Weights are compared as they are, without aligning neurons. An expert without gate projection has m in {up, down}.

The squared norms come from inner products, summed over blocks of rows in fp32 and between blocks in fp64, so one pass
over the weights with P x block values in memory does for any scope. A difference of nearly equal experts would drown in
cancellation; such pairs are compared once more directly, so equal experts have distance 0 exactly.

Peak memory: one block of rows of all experts in fp32 (64 MiB), and P x P float64 a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

EPSILON = 1e-12
BLOCK_BYTES = 64 << 20
_CANCELLED = 1e-3


class ExpertWeights(Protocol):
    """The weights of a scope's experts, read in runs of rows."""

    @property
    def experts(self) -> int:
        """Experts in the scope."""
        ...

    def matrices(self) -> tuple[str, ...]:
        """Names of the compared matrices: ``gate``, ``up``, ``down``."""
        ...

    def rows(self, matrix: str) -> tuple[int, int]:
        """(rows, values per row) of a matrix of one expert."""
        ...

    def read(self, matrix: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of all experts, [P, stop - start, values] in the checkpoint's dtype."""
        ...

    def read_one(self, matrix: str, expert: int) -> Tensor:
        """A whole matrix of one expert, [rows, values]."""
        ...


def distances(weights: ExpertWeights) -> Tensor:
    """[P, P] float64: d(e, e') for all pairs; symmetric, zero on the diagonal."""
    names = weights.matrices()
    total = torch.zeros(weights.experts, weights.experts, dtype=torch.float64)
    for name in names:
        total += _delta(weights, name)
    return total / len(names)


def _delta(weights: ExpertWeights, matrix: str) -> Tensor:
    gram = torch.zeros(weights.experts, weights.experts, dtype=torch.float64)
    for block in _blocks(weights, matrix):
        gram += (block @ block.T).cpu().double()
    gram = gram.tril() + gram.tril(-1).T  # some BLAS sum the two halves in different orders
    squares = gram.diagonal()
    squared = (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)
    scale = squares[:, None] + squares[None, :]
    close = torch.triu(squared < _CANCELLED * scale, diagonal=1)
    for one, other in close.nonzero().tolist():
        difference = weights.read_one(matrix, one).float() - weights.read_one(matrix, other).float()
        exact = float(difference.double().square().sum())
        squared[one, other] = squared[other, one] = exact
    squared.fill_diagonal_(0.0)
    norms = squares.clamp(min=0).sqrt()
    return 2 * squared.sqrt() / (norms[:, None] + norms[None, :] + 2 * EPSILON)


def _blocks(weights: ExpertWeights, matrix: str) -> Iterator[Tensor]:
    """[P, block] fp32, run after run."""
    rows, values = weights.rows(matrix)
    step = max(1, BLOCK_BYTES // (4 * values * weights.experts))
    for start in range(0, rows, step):
        block = weights.read(matrix, start, min(start + step, rows))
        yield block.reshape(weights.experts, -1).float()
