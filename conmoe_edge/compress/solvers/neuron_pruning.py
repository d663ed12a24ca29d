"""Which neurons of an expert stay, and the expert without the others.

Removing the neurons Q of an expert whose activations a (already times their routing weight) have the
Gram matrix G = sum of a a^T, and letting the others make up for it, costs

    tr( W_Q ([G^-1]_QQ)^-1 W_Q^T ),        for one neuron  |W[:, j]|^2 / [G^-1]_jj,

and the best correction of the others is the least-squares one,  W' = W G[:, S] (G_SS)^-1  for the
neurons S that stay (the optimal brain surgeon of Hassibi and Stork, 1993, for whole columns). Neurons
go in rounds, the cheapest first, with W and G^-1 brought up to date after each round.

Peak memory: three [I, I] in fp32, which the ridge makes enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROUNDS = 8
"""In how many rounds neurons go, from all to none."""
_RIDGE = 0.01
_NOTHING = 1e-30
"""Activations with a smaller mean square count as none: its inverse overflows fp32."""


@dataclass(frozen=True, slots=True)
class Cut:
    """An expert with some of its neurons: their numbers, int64, ascending, and the squared error that is left."""

    neurons: Tensor
    error: float


def cuts(gram: Tensor, down: Tensor, widths: Sequence[int], ridge: float = _RIDGE) -> list[Cut]:
    """The expert in every one of ``widths``.

    Args:
        gram: [I, I], sum of a a^T over the expert's tokens.
        down: [H, I].
        widths: numbers of neurons, ascending.
        ridge: added to the diagonal of ``gram``, as a share of its mean.

    Returns:
        A cut for every width, in their order. Narrower ones are part of wider ones, and their errors greater.
    """
    whole = down.shape[1]
    weight, gram = down.float(), gram.float()
    mean = gram.diagonal().mean()
    if not float(mean) > _NOTHING:  # no token came: the largest columns stay
        order = weight.square().sum(0).argsort(descending=True, stable=True)
        return [Cut(order[:width].sort().values, 0.0) for width in widths]
    ridged = gram + torch.eye(whole) * (ridge * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged))
    alive, error = torch.arange(whole), 0.0
    found: list[Cut] = []
    for width in sorted(widths, reverse=True):
        rounds = -(-(len(alive) - width) * ROUNDS // whole)
        for after in range(rounds - 1, -1, -1):
            count = width + (len(alive) - width) * after // (after + 1)
            cost = weight.square().sum(0) / inverse.diagonal()
            order, gone = cost.argsort(stable=True), len(alive) - count
            stay = order[gone:].sort().values
            order = torch.cat([order[:gone], stay])
            weight, inverse = weight.index_select(1, order), among(inverse, order)
            out, left = weight[:, :gone], weight[:, gone:]
            factor = torch.linalg.cholesky(inverse[:gone, :gone])
            solved = torch.cholesky_solve(torch.cat([out.T, inverse[:gone, gone:]], 1), factor)
            own, rest = solved[:, : len(weight)], solved[:, len(weight) :]
            error += float((out.T * own).sum(dtype=torch.float64))
            weight = left - out @ rest
            inverse = inverse[gone:, gone:] - inverse[gone:, :gone] @ rest
            alive = alive[stay]
        found.append(Cut(alive, error))
    return found[::-1]


def among(square: Tensor, order: Tensor) -> Tensor:
    """Rows and columns ``order`` [n] of a matrix, in that order; several times faster than indexing with it twice."""
    return square.index_select(0, order).gather(1, order.expand(len(order), -1))


def corrected(gram: Tensor, down: Tensor, neurons: Tensor) -> Tensor:
    """fp32 [H, n]: the down projection of the ``neurons`` [n] that makes up for the others.

    ``gram`` and ``down`` as of ``cuts``.
    """
    weight, gram = down.float(), gram.float()
    mean = gram.diagonal().mean()
    if len(neurons) == weight.shape[1] or not float(mean) > _NOTHING:
        return weight[:, neurons]
    ridged = among(gram, neurons) + torch.eye(len(neurons)) * (_RIDGE * mean)
    product = weight @ gram[:, neurons]
    product += weight[:, neurons] * (_RIDGE * mean)
    return torch.cholesky_solve(product.T, torch.linalg.cholesky(ridged)).T


def surviving(gram: Tensor, down: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The neurons that stay, and the down projection that makes up for the others.

    Args:
        gram, down: as of ``cuts``.
        keep: how many stay.

    Returns:
        Neuron numbers int64 [keep], ascending; fp32 [H, keep].
    """
    if keep >= down.shape[1]:
        return torch.arange(down.shape[1]), down.float()
    (cut,) = cuts(gram, down, (keep,))
    return cut.neurons, corrected(gram, down, cut.neurons)


def take_neurons(
    module: nn.Module, parts: Mapping[str, Tensor], neurons: Tensor
) -> dict[str, Tensor]:
    """An expert's tensors with some of its neurons only, in the layout of its module."""
    width = parts["down_proj"].shape[0 if module.is_transposed else 1]
    found = {}
    for name, part in parts.items():
        if name == "down_proj":
            found[name] = part[neurons] if module.is_transposed else part[:, neurons]
        elif name == "down_proj_bias":
            found[name] = part
        else:
            chosen = neurons
            if name.startswith("gate_up_proj"):
                chosen = (
                    torch.cat([neurons, width + neurons])
                    if module.is_concatenated
                    else torch.stack([2 * neurons, 2 * neurons + 1], 1).reshape(-1)
                )
            found[name] = part[..., chosen] if module.is_transposed else part[chosen]
    return found
