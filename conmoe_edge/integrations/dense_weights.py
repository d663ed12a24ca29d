"""The dense part of a package on its way into a model: int8 weights find their place, bf16 weights their fast products.

``take_quantised`` works on the meta model, before any weight is read: where the package has a weight in int8, an
``FusedLinear`` with room for values and scales stands in its layer's place, and ``from_pretrained`` fills both by name.
``finish_dense`` runs when the weights are there. Peak memory: one weight twice. Raises ``PackageError`` where the
package has int8 weights that the model has no linear layer for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from conmoe_edge.checkpoint.package.dense_names import quantised_names
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import PackageError
from conmoe_edge.offload.compute.fused_linear import DenseProducts, FusedLinear, into_one_place
from conmoe_edge.offload.compute.torch_backend import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def take_quantised(
    model: PreTrainedModel, index: CheckpointIndex, products: DenseProducts
) -> tuple[str, ...]:
    """Make room in a meta model for the int8 weights among the dense ones of a package, ``index``; their names."""
    again = "Make the package again with conmoe-edge fit, or copy it again from where it came from."
    names = quantised_names(index.tensors)
    linears = {path: one for path, one in model.named_modules() if type(one) is nn.Linear}
    for name in names:
        path, _, last = name.rpartition(".")
        if last != "weight" or path not in linears:
            raise PackageError(
                f"The package in {index.folder} does not match its config.json.",
                f"{name} is stored in int8, but the model has no linear layer there",
                again,
            )
        model.set_submodule(path, FusedLinear(linears[path], products, int8=True), strict=True)
    return names


def finish_dense(model: PreTrainedModel, products: DenseProducts) -> None:
    """Give bf16 weights on a CPU the products that suit it, and put the weights that every token reads into one place.

    Those are the operator's for few rows, on every CPU that it was compiled on (torch's product of one row with a bf16
    matrix reads at less than half of the memory's rate, also on processors with bf16 instructions), and fp32 ones for
    many rows where the processor has no bf16 instructions.

    A model in fp32 keeps transformers' own products.
    """
    machine = products.machine
    if machine.device != "cpu":
        return
    if products.operator is not None or not machine.native_bf16:
        for path, module in list(model.named_modules()):
            weight = module.weight if type(module) is nn.Linear else None
            if weight is not None and weight.dtype == torch.bfloat16:
                model.set_submodule(path, FusedLinear(module, products, int8=False), strict=True)  # pyright: ignore[reportArgumentType]
    into_one_place(model.parameters())


def products_for(device: torch.device) -> DenseProducts:
    """How dense products run on ``device``."""
    return DenseProducts(Machine.here(device))
