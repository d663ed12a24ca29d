"""Least squares from sums: one pass over the rows, nothing of a row is kept.

With the features p(t) in R^I and what is wanted of them y(t) in R^H, the weights [H, I] that minimise

    sum over t of |y(t) - W p(t)|^2  +  lambda |W|^2,    lambda = ridge * mean of the diagonal of G,

are  W = C (G + lambda)^-1  with the sums  G = sum of p p^T  and  C = sum of y p^T. The ridge holds
those directions at 0 that the rows say nothing about, and makes the system solvable with any rows.

Peak memory: G [I, I] and C [H, I] in fp64, G once more while it is factored. Time: I^3 / 3 + 2 H I^2.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """The sums ``gram`` = G and ``cross`` = C over the rows so far, on the host."""

    def __init__(self, features: int, outputs: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.cross = torch.zeros(outputs, features, dtype=torch.float64)

    def add(self, features: Tensor, wanted: Tensor) -> None:
        """Rows [n, I] and [n, H]. Summed in their own dtype within a call, in fp64 between calls."""
        self.gram += (features.T @ features).double().cpu()
        self.cross += (wanted.T @ features).double().cpu()

    def solve(self, ridge: float) -> Tensor:
        """fp64 [H, I]; zeros where no feature was ever on."""
        damped = self.gram.clone()
        damped.diagonal().add_(max(ridge * float(self.gram.diagonal().mean()), 1e-30))
        return torch.cholesky_solve(self.cross.T, torch.linalg.cholesky(damped)).T
