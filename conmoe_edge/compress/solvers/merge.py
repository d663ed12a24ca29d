"""One expert out of several: their neurons brought into one order, then the mean of their weights.

Alignment. Permuting the rows of gate and up, their biases and the columns of down in the same way leaves an expert's
function as it is, so neurons have no order of their own, and have to meet those that are most like them before weights
are added up. With

    v_i = (gate row i, up row i, their biases, down column i),

the permutation pi maximises  sum over i of <v_i of the reference, v_pi(i) of the other>, an assignment problem that is
solved exactly (Jonker-Volgenant, in scipy). M-SMoE (arXiv 2310.01334, section 3.1) does so for experts with two
matrices; with a gate, its rows belong to the neuron as well. Memory: [I, I] in fp32 and once more in fp64, and the two
experts in fp32. Time: I^3 at worst, 0.1 to 0.3 s at I = 768.

Mean, weighted by usage, for every matrix and bias (section 3.2); a group without tokens is averaged equally:

    W = sum over e in the group of n_e W_e / sum over e in the group of n_e

Sums are in fp64 and rounded once, so that equal experts merge to themselves bit for bit. Memory: one expert in fp64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from conmoe_edge.compress.solvers.neuron_pruning import take_neurons


def neuron_views(module: nn.Module, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What belongs to the neurons of one expert: tensors [I, n], a row a neuron, views of ``parts``.

    ``module`` says how the parts are laid out. The bias of the output belongs to no neuron.
    """
    found = []
    for name, part in sorted(parts.items()):
        if name == "down_proj_bias":
            continue
        if name == "down_proj":
            found.append(part if module.is_transposed else part.T)
            continue
        rows = part.unsqueeze(-1) if part.dim() == 1 else part.T if module.is_transposed else part
        if not name.startswith("gate_up_proj"):
            found.append(rows)
        elif module.is_concatenated:
            found.extend(rows.chunk(2))
        else:
            found.extend((rows[0::2], rows[1::2]))
    return tuple(found)


def likeness(
    module: nn.Module, reference: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> Tensor:
    """fp32 [I, I]: the inner product of every neuron of ``reference`` with every one of ``other``."""
    views = (neuron_views(module, one) for one in (reference, other))
    total: Tensor | None = None
    for ours, theirs in zip(*views, strict=True):
        product = ours.float() @ theirs.float().T
        total = product if total is None else total.add_(product)
    assert total is not None, "an expert has neurons"
    return total


def alignment(
    module: nn.Module, reference: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> Tensor:
    """int64 [I]: which neuron of ``other`` goes where each neuron of ``reference`` is."""
    inner = likeness(module, reference, other).double().cpu().numpy()
    rows, columns = linear_sum_assignment(inner, maximize=True)
    order = torch.empty(len(rows), dtype=torch.int64)
    order[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return order


def aligned(
    module: nn.Module, reference: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``other`` with its neurons in the order of ``reference``; the same function as before."""
    order = alignment(module, reference, other)
    return take_neurons(module, other, order.to(next(iter(other.values())).device))


def shares(usage: Sequence[float]) -> list[float]:
    """Usage as shares of 1; equal ones where all of it is 0.

    Raises:
        ValueError: a usage that is negative or not finite.
    """
    if not usage or not all(0.0 <= one < float("inf") for one in usage):
        raise ValueError(f"{list(usage)} is not a usage of experts")
    total = sum(usage)
    return [1.0 / len(usage) if total == 0 else one / total for one in usage]


def weighted_mean(
    members: Iterable[Mapping[str, Tensor]], usage: Sequence[float]
) -> dict[str, Tensor]:
    """The mean of experts of one layout, taken one after another.

    Args:
        members: their tensors by parameter name, aligned.
        usage: of each, such as the number of its tokens; a member that was not used adds nothing
            beside used ones.

    Returns:
        Tensors in fp32.
    """
    total: dict[str, Tensor] = {}
    for parts, share in zip(members, shares(usage), strict=True):
        for name, part in parts.items():
            wide = part.to(torch.float64) * share
            total[name] = total[name].add_(wide) if name in total else wide
    return {name: part.float() for name, part in total.items()}
