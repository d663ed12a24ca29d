"""What every method is given and what it returns.

A method says what it ``needs`` beyond the sums over routed tokens, and decides one scope at a time:
``decide(scope, keep) -> Decision``. It sees the weights of one scope and may compute single experts; it never opens a
file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout, SlotRecord
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.statistics import LayerStatistics, OutputVectors
from conmoe_edge.model.router import Selection
from conmoe_edge.plan.record_options import RecordOption

Parts = Mapping[str, Tensor]
"""The tensors of one expert by parameter name, as its module keeps them; with a precision of the
method's own, as the records of that precision have them."""


class PoolWeights(Protocol):
    """The pretrained weights of a scope's experts, one expert at a time."""

    def parts(self, expert: ExpertId) -> Parts:
        """One expert's tensors; views, not to be written to."""
        ...


class LayoutOf(Protocol):
    """The layout of a prototype's record."""

    def __call__(self, width: int, kind: str = "") -> RecordLayout:
        """With so many neurons; of the job's only kind, where none is named."""
        ...


@dataclass(frozen=True, slots=True)
class Needs:
    """What calibration has to keep for a method.

    ``vectors``: sums of the outputs and of their squares per expert (2 * E * H float64).
    ``tokens``: the calibration tokens themselves, as they enter the experts (T * H).
    ``logits``: the router's logits of these tokens (T * E), with ``tokens``.
    ``target``: the tokens are those of the package's stream so far, each with what its routed experts
    would have to give to be back on the original's residual stream (another T * H, and the stream of
    the original beside that of the package); with ``tokens``, for scopes of one layer.
    ``inputs``: the tokens that come to the prototypes, for rounding them with error feedback: of the
    package's stream so far where scopes have one layer (another stream beside the original's), else of
    the original's (T * H for every layer of a scope). What is rounded asks for this, not the method.
    """

    vectors: bool = False
    tokens: bool = False
    logits: bool = False
    target: bool = False
    inputs: bool = False


@dataclass(frozen=True, slots=True)
class LayerView:
    """What calibration saw of one layer of a scope. ``tokens`` and ``vectors`` only where the method needs them.

    ``top_k``: router slots that a token chooses. ``selection``: how its router chooses them, for
    methods that reroute.
    """

    layer: int
    experts: int
    top_k: int
    statistics: LayerStatistics
    tokens: LayerTokens | None = None
    vectors: OutputVectors | None = None
    selection: Selection | None = None


@dataclass(frozen=True, slots=True)
class ScopeView:
    """One scope: its pool in the order (layer, expert), what calibration saw, and its weights.

    Attributes:
        pool: all routed experts of the scope.
        layers: in ascending order.
        weights: pretrained experts by id.
        distances: gives [P, P] float64, the weight distance of ConMoE; costs a pass over the weights.
        module: the experts module of the scope's last layer: activation, layout and shapes. Its
            weights must not be used; ``weights`` has them.
        widths: numbers of neurons that a prototype may have, ascending; all of an expert's alone
            unless the method trims.
        sizes: bytes of a record of each of them.
        room: bytes that the prototypes may take; later scopes get what is left. 0 where only their
            number counts.
        dtype, device: in which and where experts are computed.
        constants: whether a router slot may add a constant; another engine may have no place for one.
        record: the layout of a prototype; ``None`` where the plan says how many records are of which of two kinds.
        options: where prototypes have kinds of their own, the records that one may become, by bytes ascending.
        gone: bytes that an expert takes there that goes: a constant.
    """

    pool: tuple[ExpertId, ...]
    layers: tuple[LayerView, ...]
    weights: PoolWeights
    distances: Callable[[], Tensor]
    module: nn.Module
    widths: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    room: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    constants: bool = True
    record: LayoutOf | None = None
    options: tuple[RecordOption, ...] = ()
    gone: int = 0

    def over_pool(self, of: Callable[[LayerStatistics], Tensor]) -> Tensor:
        """[P] float64: a number of every expert, layer after layer in the order of the pool."""
        return torch.cat([of(layer.statistics) for layer in self.layers])


@dataclass(frozen=True, slots=True)
class Decision:
    """The prototypes of a scope and what every router slot of it becomes.

    Attributes:
        prototypes: sorted.
        slots: one record for every router slot, in the order of the pool. ``SlotRecord.constant`` is a row
            of ``constants`` of the slot's own layer.
        constants: layer -> [n, H] fp32, for the layers that have any.
        rerouted: layers whose router may not choose slots that have neither prototype nor constant.
        parts: the weights of a prototype where they are not the pretrained expert's; called once
            for every prototype, in their order. ``None``: all are pretrained, bit for bit.
        made: weights of prototypes that are in their stored form already, and are written as they are.
        widths: neurons of a prototype, where not all have the widest of the scope's ``widths``.
        kinds: of a prototype's record, where they have kinds of their own.
        left: [T, H] fp32 where the method has it: what is left of the target of its layer's tokens as
            ``LayerTokens.weighted`` gives it, with the weights of ``made``, and of ``parts`` where there is none.
        notes: plain sentences for the reader of the manifest, such as a fallback that was taken.
    """

    prototypes: tuple[ExpertId, ...]
    slots: tuple[SlotRecord, ...]
    constants: Mapping[int, Tensor] = field(default_factory=dict)
    rerouted: frozenset[int] = frozenset()
    parts: Callable[[ExpertId], Parts] | None = None
    made: Mapping[ExpertId, Mapping[str, Matrix]] = field(default_factory=dict)
    widths: Mapping[ExpertId, int] = field(default_factory=dict)
    kinds: Mapping[ExpertId, str] = field(default_factory=dict)
    left: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """A method by name.

    Attributes:
        title: for tables: the name as its authors write it.
        source: where it was published.
        decide: a pure function of the scope and of how many prototypes are kept.
        needs: what calibration has to keep for it.
        precision: the only precision that it can be stored in, where there is one.
        budgets: whether layers get as many prototypes as they are worth (``layer_budgets.py``), instead of
            the same number.
        trims: whether prototypes have fewer neurons than experts (``plan/width_levers.py``).
        within_layers: whether it is for scopes of one layer only.
        reroutes: whether routers may not choose the slots that it drops.
        constants: whether router slots may add constants.
    """

    name: str
    title: str
    source: str
    decide: Callable[[ScopeView, int], Decision]
    needs: Needs = field(default_factory=Needs)
    precision: str | None = None
    trims: bool = False
    budgets: bool = False
    within_layers: bool = False
    reroutes: bool = False
    constants: bool = False


def identity(scope: ScopeView) -> Decision:
    """Every expert kept, every router slot its own: what each method gives when nothing is removed."""
    return Decision(scope.pool, tuple(SlotRecord(expert) for expert in scope.pool))
