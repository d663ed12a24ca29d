"""Down projections and constants of a layer, solved so that the layer's output is least changed.

With the activations a_p(t) of the prototypes, their merged routing weights alpha_p(t), and the gates
g_i(t) of the chosen slots, the routed output is linear in the down projections W_p and the slots'
constants c_i:

    y(t) = sum over p of W_p (alpha_p a_p)(t)  +  sum over i of g_i(t) c_i.

Both are moved from where they are (the W that are given, c = 0) to the minimum of

    sum over t of |target(t) - y(t)|^2  +  lambda * (sum over p of |W_p - W_p0|^2 + ...),

block by block (a prototype, then all constants), each block exactly: one sweep of Gauss-Seidel. On the
demo model more sweeps lower the error on held-out tokens by one per cent.

The ridge is  lambda = PRIOR * mean |z(t)|^2  over the tokens t that came to a prototype (to the layer,
for constants), z its features. It does not grow with the calibration text: a prototype that many
tokens came to moves freely, one with few stays where it was, and the more features there are to fit,
the more tokens that takes.

Products with activations are taken in the format that these have. On processors with bf16 units that is bf16, in half
the time: what a solved projection changes is a few per cent of it, and the roundings of that are nothing beside what
few bits lose. Gram matrices and systems of equations are in fp32 and fp64.

Peak memory: the activations of all routed tokens (sum of n_p * I), the target [T, H], the down projections, one [I, I]
in fp32 a prototype (and one in fp64 while it is factored).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.compress.solvers.neuron_pruning import among
from conmoe_edge.memory.heap import trimmed

PRIOR = 5.0
"""How strongly everything is held where it was, see above."""


@dataclass(slots=True)
class Features:
    """One prototype's tokens: ``rows`` [n] of the layer's tokens, the activations ``values`` [n, I] in the format of
    products, ``alpha`` fp32 [n], and the ``gram`` matrix of their products, fp32 [I, I].
    """

    rows: Tensor
    values: Tensor
    alpha: Tensor
    gram: Tensor

    def of(self, neurons: Tensor) -> Features:
        """Some of the neurons, [n] ascending."""
        if len(neurons) == self.values.shape[1]:
            return self
        values = self.values[:, neurons].contiguous()
        return Features(self.rows, values, self.alpha, among(self.gram, neurons))

    def weighted(self) -> Tensor:
        """fp32 [n, I]: activations times alpha."""
        return self.values.float() * self.alpha.unsqueeze(1)

    def outputs(self, weight: Tensor) -> Tensor:
        """fp32 [n, H], for ``weight`` fp32 [I, H]."""
        found = self.values @ weight.to(self.values.dtype)
        return found.float().mul_(self.alpha.unsqueeze(1))

    def gradient(self, residual: Tensor) -> Tensor:
        """fp32 [I, H], for ``residual`` fp32 [T, H]."""
        own = residual[self.rows].mul_(self.alpha.unsqueeze(1))
        return (self.values.T @ own.to(self.values.dtype)).float()


def refit(
    features: Sequence[Features],
    down: Iterable[Tensor],
    gates: Tensor,
    residual: Tensor,
    *,
    constants: bool = True,
    rounded: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Solve.

    Args:
        features: of every prototype.
        down: [H, I] of every prototype; each is taken once, and held in another order.
        gates: fp32 [T, E], the gate of every slot that a token chose, else 0.
        residual: fp32 [T, H]: the target less whatever is not refitted (biases); becomes what is left of it.
        constants: whether slots have any.
        rounded: called with a prototype's place, its solved [H, I] and its Gram matrix: what is stored of it. What
            that loses is left for the prototypes and the constants behind it to make up for.

    Returns:
        fp32 [H, I] of every prototype; fp32 [E, H] constants, zeros where slots have none.
    """
    weights = [one.T.float().contiguous() for one in down]  # [I, H]
    for one, weight in zip(features, weights, strict=True):
        residual.index_add_(0, one.rows, one.outputs(weight), alpha=-1.0)
    ridge = _ridge([one.gram for one in features], sum(len(one.rows) for one in features))
    for place in trimmed(range(len(features))):
        one, weight = features[place], weights[place]
        solved = weight
        if len(one.rows):
            solved = weight + _step(one.gram, ridge, one.gradient(residual))
        if rounded is not None:
            solved = rounded(place, solved.T, one.gram).T
        if solved is not weight:
            residual.index_add_(0, one.rows, one.outputs(solved - weight), alpha=-1.0)
            weights[place] = solved
    table = torch.zeros(gates.shape[1], residual.shape[1])
    if constants:
        table = solve_constants(gates, residual)
        residual.addmm_(gates, table, alpha=-1.0)
    return [weight.T for weight in weights], table


def solve_constants(gates: Tensor, residual: Tensor) -> Tensor:
    """fp32 [C, H]: what slots whose gates are ``gates`` fp32 [T, C] add, to be nearest to ``residual`` fp32 [T, H]."""
    gram = gates.T @ gates
    return _step(gram, _ridge([gram], len(gates)), gates.T @ residual)


def _ridge(grams: Sequence[Tensor], visits: int) -> float:
    """lambda for features with these Gram matrices, summed over ``visits`` tokens in all."""
    squares = sum(float(one.diagonal().sum(dtype=torch.float64)) for one in grams)
    return PRIOR * squares / max(1, visits)


def _step(gram: Tensor, ridge: float, gradient: Tensor) -> Tensor:
    """The exact step of one block: (Z^T Z + ridge)^-1 Z^T residual."""
    ridged = gram.double()
    ridged.diagonal().add_(max(ridge, 1e-30))
    return torch.cholesky_solve(gradient, torch.linalg.cholesky(ridged).float())
