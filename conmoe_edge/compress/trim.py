"""Which neurons of an expert stay, and the expert without the others.

Removing neuron j of an expert whose activations a (already times their routing weight) have the
Gram matrix G = sum of a a^T, and letting the others make up for it, costs

    |W[:, j]|^2 / [G^-1]_jj,

and the best correction of the others is  W - W[:, Q] ([G^-1]_QQ)^-1 [G^-1]_Q:  for a set Q (the
optimal brain surgeon of Hassibi and Stork, 1993, for whole columns). Neurons go in rounds, the
cheapest first, with W and G^-1 brought up to date after each round.

Peak memory: three [I, I] in fp32, which the ridge makes enough.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ROUNDS = 8
_RIDGE = 0.01


def surviving(gram: Tensor, down: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The neurons that stay, and the down projection that makes up for the others.

    Args:
        gram: [I, I], sum of a a^T over the expert's tokens.
        down: [H, I].
        keep: how many stay.

    Returns:
        Neuron numbers int64 [keep], ascending; fp32 [H, keep].
    """
    width = down.shape[1]
    weight = down.float()
    alive = torch.arange(width)
    if keep >= width:
        return alive, weight
    gram = gram.float()
    mean = gram.diagonal().mean()
    if not float(mean) > 0.0:  # nobody came: the largest columns stay
        chosen = weight.square().sum(0).argsort(descending=True, stable=True)[:keep].sort().values
        return chosen, weight[:, chosen]
    ridged = gram + torch.eye(width) * (_RIDGE * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged))
    rounds = min(ROUNDS, width - keep)
    for number in range(rounds):
        left = width - (width - keep) * (number + 1) // rounds
        cost = weight.square().sum(0) / inverse.diagonal()
        order = cost.argsort(stable=True)
        gone, stay = order[: len(alive) - left], order[len(alive) - left :].sort().values
        solved = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
        weight = weight[:, stay] - weight[:, gone] @ solved
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ solved
        alive = alive[stay]
    return alive, weight


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
