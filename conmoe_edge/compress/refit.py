"""Down projections and constants of a layer, solved so that the layer's output is least changed.

With the activations a_p(t) of the prototypes, their merged routing weights alpha_p(t), and the gates
g_i(t) of the chosen slots, the routed output is linear in the down projections W_p and the slots'
constants c_i:

    y(t) = sum over p of W_p (alpha_p a_p)(t)  +  sum over i of g_i(t) c_i.

Both are moved from where they are (the W that are given, c = 0) to the minimum of

    sum over t of |target(t) - y(t)|^2  +  lambda * (sum over p of |W_p - W_p0|^2 + ...),

block by block (a prototype, then all constants), each block exactly (Gauss-Seidel). One sweep is what
is done: on the demo model more of them lower the error on held-out tokens by one per cent.

The ridge is  lambda = PRIOR * mean |z(t)|^2  over the tokens t that came to a prototype (to the layer,
for constants), z its features. It does not grow with the calibration text: a prototype that many
tokens came to moves freely, one with few stays where it was, and the more features there are to fit,
the more tokens that takes.

Peak memory: the activations of all routed tokens (sum of n_p * I in fp32), the target [T, H], and
one [I, I] in fp32 a prototype (and one in fp64 while it is factored).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SWEEPS = 1
"""Times that every block is solved."""
PRIOR = 5.0
"""How strongly everything is held where it was, see above."""


@dataclass(slots=True)
class Features:
    """One prototype's tokens: ``rows`` [n] of the layer's tokens, ``values`` fp32 [n, I], already times alpha, and
    ``gram`` = values^T values.
    """

    rows: Tensor
    values: Tensor
    gram: Tensor


def refit(
    features: Sequence[Features], down: Sequence[Tensor], gates: Tensor, residual: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Solve.

    Args:
        features: of every prototype.
        down: [H, I] of every prototype.
        gates: fp32 [T, E], the gate of every slot that a token chose, else 0.
        residual: fp32 [T, H]: the target less whatever is not refitted (biases); used up.

    Returns:
        fp32 [H, I] of every prototype; fp32 [E, H] constants.
    """
    weights = [one.T.float().contiguous() for one in down]  # [I, H]
    for one, weight in zip(features, weights, strict=True):
        residual.index_add_(0, one.rows, one.values @ weight, alpha=-1.0)
    ridge = _ridge([one.gram for one in features], sum(len(one.rows) for one in features))
    factors = [_factor(one.gram, ridge) for one in features]
    gram = gates.T @ gates
    gate_ridge = _ridge([gram], len(gates))
    gate_factor = _factor(gram, gate_ridge)
    moved = [torch.zeros_like(weight) for weight in weights]
    constants = torch.zeros(gates.shape[1], residual.shape[1])
    for _ in range(SWEEPS):
        for one, factor, weight, path in zip(features, factors, weights, moved, strict=True):
            if not len(one.rows):
                continue
            here = residual[one.rows]
            step = _solve(factor, one.values.T @ here, path, ridge)
            weight += step
            path += step
            residual.index_add_(0, one.rows, one.values @ step, alpha=-1.0)
        step = _solve(gate_factor, gates.T @ residual, constants, gate_ridge)
        constants += step
        residual.addmm_(gates, step, alpha=-1.0)
    return [weight.T for weight in weights], constants


def _ridge(grams: Sequence[Tensor], visits: int) -> float:
    """lambda for features with these Gram matrices, summed over ``visits`` tokens in all."""
    squares = sum(float(one.diagonal().sum(dtype=torch.float64)) for one in grams)
    return PRIOR * squares / max(1, visits)


def _factor(gram: Tensor, ridge: float) -> Tensor:
    ridged = gram.double()
    ridged.diagonal().add_(max(ridge, 1e-30))
    return torch.linalg.cholesky(ridged).float()


def _solve(factor: Tensor, gradient: Tensor, path: Tensor, ridge: float) -> Tensor:
    """The exact step of one block: (Z^T Z + ridge)^-1 (Z^T residual - ridge * path)."""
    return torch.cholesky_solve(gradient - ridge * path, factor)
