"""The experts of a model that was left unchanged: computed where transformers has loaded them.

transformers keeps the experts of a layer as one parameter a projection, gate and up [E, 2I, H] and down [E, I, H]
transposed, [E, H, I]. Where they are [out, in], an expert's rows lie one after the other, as a record in the source's
precision has them. So each expert is a ``StoredExpert`` of views, the layer's map sends every router slot to its own,
and all behind it is what computes a package of records (``cpu_layer.py``): to the same bits, few tokens and many.

``LoadedExperts`` stands in front of an experts module's ``forward``. Weights that were moved or exchanged since, and a
module in training, go transformers' way.

Memory: views and addresses; no number is there twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.model.experts import find_experts, part_names
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.compute.backend import LayerExperts
from conmoe_edge.offload.compute.cpu_layer import CpuBackend
from conmoe_edge.offload.compute.experts_forward import (
    HANDLE,
    LayerHandle,
    LeftAlone,
    conmoe_experts_forward,
)
from conmoe_edge.offload.compute.torch_backend import Arithmetic
from conmoe_edge.offload.kernels.cpu.bindings import operator
from conmoe_edge.offload.residency.address_table import AddressTable
from conmoe_edge.offload.storage.stored_expert import StoredExpert


class _Views:
    """``ExpertPool`` of the experts of one layer."""

    def __init__(self, experts: Sequence[StoredExpert]) -> None:
        self._experts = experts

    def parts(self, slot: int) -> StoredExpert:
        return self._experts[slot]


class LoadedWeights:
    """``PrototypeSource`` of one layer whose experts are all there for good, numbered as its router slots.

    Attributes:
        table, pools, prefetcher: as of ``Residency``; nothing is read ahead.
        places: where the parameters lay that the experts are views of, by name.
    """

    prefetcher = None

    def __init__(self, module: nn.Module) -> None:
        """Of an experts module whose weights are where they stay."""
        weights = {name: module.get_parameter(name) for name in part_names(module)}
        self.places = {name: one.data_ptr() for name, one in weights.items()}
        every = zip(*[one.detach().unbind() for one in weights.values()], strict=True)
        self._experts = [StoredExpert(dict(zip(weights, one, strict=True))) for one in every]
        self.pools = (_Views(self._experts),)
        self.table = AddressTable()
        for number in range(self.count):
            self.table.assign(number, (0, number))
            self.table.arrived(number)
        self.table.pin(range(self.count))

    @property
    def count(self) -> int:
        return len(self._experts)

    def kinds(self, numbers: Iterable[int]) -> list[StoredExpert]:
        return self._experts[:1]  # they are slices of the same parameters

    def used(self, count: int) -> None:
        """Nothing is counted: there are no misses."""

    def asked(self, numbers: Sequence[int]) -> None:
        """As ``used``."""

    def resident(self, numbers: Sequence[int]) -> list[StoredExpert]:
        return [self._experts[number] for number in numbers]

    def visit(
        self,
        numbers: Sequence[int],
        compute: Callable[[Sequence[int], Sequence[StoredExpert]], None],
        *,
        scan: bool = False,
        ahead: Sequence[int] = (),
    ) -> None:
        compute(list(range(len(numbers))), self.resident(numbers))

    def likely_next(self, layer: int, hidden: Tensor) -> Sequence[int]:
        return ()

    def scanned_next(self, layer: int, asked: int) -> Sequence[int]:
        return ()

    def prefetch(self, numbers: Sequence[int], keep: Sequence[int] = ()) -> None:
        """Nothing is read ahead."""

    def collect(self, scanned: Sequence[int] = ()) -> None:
        """As ``prefetch``."""


class LoadedHandle(LayerHandle):
    """``LayerHandle`` of a layer with ``LoadedWeights``: without experts once its weights have moved."""

    def __init__(self, slots: SlotTensors, weights: LoadedWeights) -> None:
        super().__init__(slots)
        self._places = weights.places

    def experts(self, module: nn.Module) -> LayerExperts | None:
        """As of ``LayerHandle``; ``None`` where a parameter of ``module`` is not where it was. Then it stays so."""
        own = module._parameters
        for name, place in self._places.items():
            weight = own.get(name)
            if weight is None or weight.data_ptr() != place:
                self.use(None)  # lets go of the memory where they were
                return None
        return super().experts(module)


class LoadedExperts:
    """Stands in front of the ``forward`` of an experts module, for inference only."""

    def __init__(self, module: nn.Module, handle: LoadedHandle) -> None:
        self._own = weakref.WeakMethod(module.forward)
        self._handle = handle

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' interface: [..., H], [..., K], [..., K] -> [..., H]."""
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        module: nn.Module = own.__self__
        suits = hidden_states.dtype == torch.bfloat16 and not module.training
        if not suits or self._handle.experts(module) is None:
            return own(hidden_states, *args, **kwargs)
        return conmoe_experts_forward(module, hidden_states, *args, **kwargs)


def take_loaded_experts(model: nn.Module, arithmetic: Arithmetic) -> None:
    """Let the operator compute the experts of ``model``, an unchanged one whose weights are where they stay, where it
    takes them as they lie. A layer that is left to transformers has the reason in ``HANDLE``.

    Weights in fp32 stay there as well: transformers' functions are as fast, for prompts faster than one expert after
    the other, and such a model gives transformers' own numbers.
    """
    for layer, (_, module) in find_experts(model).items():
        reason = _why_not(module)
        weights = None if reason else LoadedWeights(module)
        if weights is not None and not _suits(module, weights):
            reason = f"the operator does not take the weights of {type(module).__name__}"
        if weights is None or reason:
            setattr(module, HANDLE, LeftAlone(reason))
            continue
        own = tuple(range(weights.count))
        each = SlotMap(layer, own, (1.0,) * weights.count, (NONE,) * weights.count)
        handle = LoadedHandle(SlotTensors.of(each, None, torch.device("cpu")), weights)
        handle.use(CpuBackend(torch.device("cpu"), weights, arithmetic))
        setattr(module, HANDLE, handle)
        module.forward = LoadedExperts(module, handle)


def _why_not(module: nn.Module) -> str:
    """Why the operator cannot compute these experts where they lie; empty where it may."""
    name, formats = type(module).__name__, {one.dtype for one in module.parameters(recurse=False)}
    if operator() is None:
        return "there is no compiled operator"
    if formats != {torch.bfloat16}:
        words = " and ".join(sorted(str(one).removeprefix("torch.") for one in formats))
        return f"{name} keeps its weights in {words}"
    if module.is_transposed:
        return f"{name} keeps its weights transposed, [in, out]"
    return ""


def _suits(module: nn.Module, weights: LoadedWeights) -> bool:
    return all(one.suits_operator(module, torch.bfloat16) for one in weights.kinds(()))
