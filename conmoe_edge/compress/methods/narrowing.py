"""What every expert of a layer loses with fewer neurons.

For an expert e with activations v(t) = g(t) a(t) on its tokens, a constant c that its router slot gives as g(t) c takes
one direction out of them: with m = sum of g v / sqrt(sum of g^2), errors are measured on the Gram matrix
G = sum of v v^T - m m^T.  With no neuron left the error is tr(W G W^T), that of the best constant. The ridge beside G
is worth the activations of ``PRIOR`` tokens, so that an expert with few tokens does not seem to need few neurons; with
a larger ridge every neuron looks dear, and whole experts go instead.

A down projection with more than ``slot_errors.SKETCH`` rows is sketched as outputs are there.

Peak memory: one [I, I] in fp32 an expert, and the activations of the experts that go side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.compress.methods.interface import ScopeView
from conmoe_edge.compress.methods.rebuild import activations, down_rows
from conmoe_edge.compress.solvers.neuron_pruning import cuts
from conmoe_edge.compress.solvers.refit import Features
from conmoe_edge.compress.solvers.slot_errors import sketch
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.work.side_by_side import side_by_side

PRIOR = 1.0
_NEARLY_CONSTANT = 0.01
"""Where the difference is this share of the Gram matrix, its rounding shows: it is summed over tokens again."""


@dataclass(frozen=True, slots=True)
class Narrowing:
    """One expert: ``errors`` with no neuron and in every width of the scope; ``neurons`` of every width."""

    errors: tuple[float, ...]
    neurons: tuple[Tensor, ...]


def narrowings(
    scope: ScopeView, tokens: LayerTokens, gates: Tensor
) -> tuple[list[Tensor], list[Narrowing]]:
    """The Gram matrices [I, I] of all experts' activations, and what each expert loses in every width.

    Args:
        scope: of one layer.
        tokens: of the layer.
        gates: fp32 [T, E], the gate of every slot that a token chose, else 0.
    """

    def of(expert: int) -> tuple[Tensor, Narrowing]:
        gate = gates[:, expert]
        one = activations(scope, tokens, expert, gate)
        return one.gram, narrowing(scope, expert, one, gate[one.rows])

    found = side_by_side(of, range(len(scope.pool)))
    return [gram for gram, _ in found], [one for _, one in found]


def narrowing(scope: ScopeView, expert: int, own: Features, gates: Tensor) -> Narrowing:
    """What one expert loses in every width of the scope, by its activations on its tokens and their gates [n]."""
    down = down_rows(scope, expert)
    count, width = own.values.shape
    square = gates.square().sum().clamp(min=1e-30)
    values = own.weighted()
    middle = (gates @ values) / square.sqrt()
    gram = own.gram - torch.outer(middle, middle)
    if gram.diagonal().sum() < _NEARLY_CONSTANT * own.gram.diagonal().sum():
        rest = values - torch.outer(gates / square.sqrt(), middle)
        gram = rest.T @ rest
    matrix = sketch(len(down))
    if matrix is not None:  # columns keep their lengths, near enough
        down = matrix.T @ down
    found = cuts(gram, down, scope.widths, PRIOR * width / max(1, count))
    nothing = float(((down @ gram) * down).sum(dtype=torch.float64))
    return Narrowing(
        (max(nothing, found[0].error), *(one.error for one in found)),
        tuple(one.neurons for one in found),
    )
