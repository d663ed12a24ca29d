"""The dense part of a package on its way into a model: weights in fewer bits find their place, bf16 weights their fast
products.

``take_quantised`` works on the meta model, before any weight is read: every tensor has a number format that the model
has a use for, and where the package has a weight in fewer bits, a ``FusedLinear`` or a ``QuantisedEmbedding`` with room
for values and scales stands in its layer's place, and ``from_pretrained`` fills both by name. ``check_values`` looks at
them when they are there. ``finish_dense`` runs when the weights are there. Peak memory: one weight twice. Raises
``PackageError`` where the package has such weights that the model has no place for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import LOW_BITS, Kind
from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE, own_shapes, quantised_forms
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, TensorEntry
from conmoe_edge.errors import PackageError, UsageError
from conmoe_edge.model import bridge
from conmoe_edge.model.all_finite import all_finite
from conmoe_edge.model.linears import embeddings_of, tied_head
from conmoe_edge.model.record_match import AGAIN, mismatch
from conmoe_edge.model.text_part import absent_in, lies_in
from conmoe_edge.offload.compute.fused_embedding import QuantisedEmbedding
from conmoe_edge.offload.compute.fused_linear import DenseProducts, FusedLinear, into_one_place
from conmoe_edge.offload.compute.torch_backend import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = "weight_scale"
_FLOATING = ("BF16", "F16", "F32", "F64")


def take_quantised(
    model: PreTrainedModel, index: CheckpointIndex, products: DenseProducts, *, quantised: bool
) -> tuple[str, ...]:
    """Make room in a meta model for the weights in fewer bits among the dense ones of a package, ``index``, which may
    have some where it is said to be ``quantised``; their names.

    Raises:
        PackageError: a tensor in a format that nothing in the model has, or values without scales.
    """
    folder, tensors = index.folder, index.tensors
    forms = quantised_forms(tensors) if quantised else {}
    scales = {name + DENSE_SCALE for name in forms}
    _check_formats(model, folder, tensors, forms.keys() | scales)
    shapes, modules, table = own_shapes(tensors), dict(model.named_modules()), embeddings_of(model)
    for name, kind in forms.items():
        path, _, last = name.rpartition(".")
        module = modules.get(path)
        looked_up = table is not None and path == table[0]
        if last != "weight" or not (looked_up or type(module) is nn.Linear):
            raise mismatch(
                folder, f"{name} is stored in {kind}, but the model has no linear layer there"
            )
        weight: Tensor = module.weight  # pyright: ignore[reportOptionalMemberAccess, reportAssignmentType]
        if weight.shape != shapes[name]:
            raise mismatch(
                folder, f"{name} is {list(shapes[name])}, the model's is {list(weight.shape)}"
            )
        if isinstance(module, nn.Embedding):
            _take_table(model, path, module, kind, products)
        elif isinstance(module, nn.Linear):
            model.set_submodule(path, FusedLinear(module, products, kind), strict=True)
    return tuple(forms)


def _take_table(
    model: PreTrainedModel, path: str, module: nn.Embedding, kind: Kind, products: DenseProducts
) -> None:
    """Room for the embeddings, and a head that shares them."""
    head = tied_head(model, path)
    made = QuantisedEmbedding(module, kind)
    model.set_submodule(path, made, strict=True)
    if head is not None:
        linear = model.get_submodule(head)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(head, FusedLinear(linear, products, kind, made), strict=True)
    rows = made.num_embeddings

    def resize(new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        if new_num_tokens in (None, rows):
            return made
        raise UsageError(
            f"The vocabulary of this package cannot become {new_num_tokens} tokens.",
            f"its embeddings are stored in {kind}, {rows} rows",
            "--dense-precision source when the package is made",
        )

    model.resize_token_embeddings = resize


def _check_formats(
    model: PreTrainedModel,
    folder: Path,
    tensors: Mapping[str, TensorEntry],
    quantised: Collection[str],
) -> None:
    """transformers converts whatever it finds into the format of the parameter, also numbers that mean nothing without
    their scales: only floating point is taken, what is ``quantised``, and what the model itself has in that format.
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


def in_few_bits(module: nn.Module) -> bool:
    """Whether a module has scales of its own in the form of ``low_bits.py``."""
    stored = module.stored if isinstance(module, FusedLinear | QuantisedEmbedding) else None
    return stored is not None and stored.kind in LOW_BITS


def check_values(model: nn.Module, folder: Path) -> None:
    """No dense weight holds NaN or infinity.

    The model's output need not show it: torch's attention on a CPU gives zeros for a query of NaN. All of these weights
    have just been read, and are read once for every token; looking at them takes about as long as one token.

    Raises:
        PackageError: naming the tensor.
    """
    packed = {f"{path}.{SCALES}" for path, one in model.named_modules() if in_few_bits(one)}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        numbers = low_bits.units(tensor) if name in packed else tensor.detach()
        if numbers.is_floating_point() and not all_finite(numbers):
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
                model.set_submodule(path, FusedLinear(module, products), strict=True)  # pyright: ignore[reportArgumentType]
    scales = [one.weight_scale for one in model.modules() if isinstance(one, FusedLinear)]
    scales += [one.weight_scale for one in model.modules() if isinstance(one, QuantisedEmbedding)]
    into_one_place([*model.parameters(), *(one for one in scales if one is not None)])


def products_for(device: torch.device) -> DenseProducts:
    """How dense products run on ``device``."""
    return DenseProducts(Machine.here(device))
