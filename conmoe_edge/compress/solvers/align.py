"""Neurons of one expert in the order of another's, so that weights of both may be averaged.

The neurons of an expert have no order of their own: permuting the rows of gate and up, their biases
and the columns of down in the same way gives the same function. Before weights of two experts are
added up, each neuron i of the one has to meet the neuron j of the other that is most like it. With

    v_i = (gate row i, up row i, their biases, down column i),

the permutation pi is the one that maximises  sum over i of <v_i of the reference, v_pi(i) of the
other>, an assignment problem that is solved exactly (Jonker-Volgenant, in scipy). M-SMoE (arXiv
2310.01334, section 3.1) does so for experts with two matrices; with a gate, its rows belong to the
neuron as well.

Peak memory: [I, I] in fp32 and once more in fp64, and the two experts in fp32. Time: I^3 at worst,
0.1 to 0.3 s at I = 768; an expert of Mixtral's width (14,336) takes very long. The assignment is the
same on every run; between equal neurons it is scipy's choice, and makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping

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
