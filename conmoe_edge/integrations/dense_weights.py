"""The dense part of a package on its way into a model: int8 weights find their place, bf16 weights their fast products.

``take_quantised`` works on the meta model, before any weight is read: every tensor has a number format that the model
has a use for, and where the package has a weight in int8, an ``FusedLinear`` with room for values and scales stands in
its layer's place, and ``from_pretrained`` fills both by name. ``check_values`` looks at them when they are there.
``finish_dense`` runs when the weights are there. Peak memory: one weight twice. Raises ``PackageError`` where the
package has int8 weights that the model has no linear layer for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from conmoe_edge.checkpoint.package.dense_names import quantised_names
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, TensorEntry
from conmoe_edge.errors import PackageError
from conmoe_edge.model import bridge
from conmoe_edge.model.record_match import AGAIN, mismatch
from conmoe_edge.model.text_part import absent_in, lies_in
from conmoe_edge.offload.compute.fused_linear import DenseProducts, FusedLinear, into_one_place
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.generation.finite import all_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATING = ("BF16", "F16", "F32", "F64")


def take_quantised(
    model: PreTrainedModel, index: CheckpointIndex, products: DenseProducts, *, in_int8: bool
) -> tuple[str, ...]:
    """Make room in a meta model for the int8 weights among the dense ones of a package, ``index``, which may have some
    where it is said to be ``in_int8``; their names.

    Raises:
        PackageError: a tensor in a format that nothing in the model has, or int8 values without scales.
    """
    folder, tensors = index.folder, index.tensors
    names = quantised_names(tensors) if in_int8 else ()
    _check_formats(model, folder, tensors, names)
    linears = {path: one for path, one in model.named_modules() if type(one) is nn.Linear}
    for name in names:
        path, _, last = name.rpartition(".")
        if last != "weight" or path not in linears:
            raise mismatch(
                folder, f"{name} is stored in int8, but the model has no linear layer there"
            )
        if linears[path].weight.shape != tensors[name].shape:
            shape = list(linears[path].weight.shape)
            raise mismatch(folder, f"{name} is {list(tensors[name].shape)}, the model's is {shape}")
        model.set_submodule(path, FusedLinear(linears[path], products, int8=True), strict=True)
    return names


def _check_formats(
    model: PreTrainedModel,
    folder: Path,
    tensors: Mapping[str, TensorEntry],
    quantised: Collection[str],
) -> None:
    """transformers converts whatever it finds into the format of the parameter, also numbers that mean nothing without
    their scales: only floating point is taken, ``quantised`` weights, and what the model itself has in that format.
    """
    own = {name: one.dtype for name, one in model.state_dict().items()}
    absent = absent_in(model)
    others = [n for n, one in tensors.items() if one.dtype not in _FLOATING and n not in quantised]
    for name, renamed in bridge.renamed(model, others).items():
        entry = tensors[name]
        if own.get(renamed) == getattr(torch, entry.torch_name, None) is not None:
            continue
        if lies_in(absent, renamed):  # nothing is filled with it
            continue
        raise mismatch(
            folder, f"{name!r:.80} is stored as {entry.dtype}, which the model cannot use"
        )


def check_values(model: nn.Module, folder: Path) -> None:
    """No dense weight holds NaN or infinity.

    The model's output need not show it: torch's attention on a CPU gives zeros for a query of NaN. All of these weights
    have just been read, and are read once for every token; looking at them takes about as long as one token.

    Raises:
        PackageError: naming the tensor.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not all_finite(tensor.detach()):
            raise PackageError(
                f"The package in {folder} is damaged.", f"{name} holds NaN or infinity", AGAIN
            )


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
