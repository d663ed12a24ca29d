"""What runs in place of a layer's experts while a model is streamed.

One function is registered with transformers (``conmoe_fit``). It calls the tap that is attached to the experts module:
``RoutedTap`` computes the layer's own experts and gathers statistics, ``MappedTap`` computes prototypes through a
reassignment map. Both go expert by expert in ascending order, so sums are the same on every run, and convert one expert
at a time where the weights have another dtype than the activations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.format.records import decode
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.compress.stats.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.stats.mixed_precision import RowSample
from conmoe_edge.compress.stats.statistics import StatisticsTracker, VectorTracker
from conmoe_edge.compress.stream.trace_recorder import RoutingRecorder
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.experts import expert_forward, part_names, sum_dtype
from conmoe_edge.model.slot_tensors import SlotTensors

IMPLEMENTATION = "conmoe_fit"

_BATCH = 1 << 13


class Tap:
    """Base of the taps. ``keep`` [T] marks real tokens of the batch that runs (``None``: all); ``seconds`` adds up."""

    def __init__(self) -> None:
        self.keep: Tensor | None = None
        self.seconds = 0.0

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]."""
        raise NotImplementedError


class RoutedTap(Tap):
    """The layer's own experts. Gathers statistics where a tracker is set, and hidden rows where a sample is."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker: StatisticsTracker | None = None
        self.routing: RoutingRecorder | None = None
        self.keep_hidden = False  # for the trace's tokens, beside their routing
        self.sample: RowSample | None = None
        self.vectors: VectorTracker | None = None
        self.tokens: TokenRecorder | None = None

    def take_logits(self, logits: Tensor) -> None:
        """[T, E] of the router, of the batch that comes next."""
        if self.tokens is not None:
            self.tokens.add_logits(logits, self.keep)

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Every expert on the tokens that the router sent to it."""
        names = part_names(module)
        experts = getattr(module, names[0]).shape[0]
        if self.routing is not None:
            self.routing.add(index, experts, hidden if self.keep_hidden else None)
        if self.tokens is not None:
            self.tokens.add(hidden, index, weights, self.keep)
        # Summed as MappedTap does: where a processor computes in bf16, another rounding would be taken for a loss.
        out = torch.zeros(hidden.shape, dtype=sum_dtype(hidden), device=hidden.device)
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat.clamp(0, experts), minlength=experts + 1).tolist()
        start = 0
        for expert in range(experts):
            chosen = order[start : start + counts[expert]]
            start += counts[expert]
            if not len(chosen):
                continue
            rows = chosen // index.shape[1]
            gates = weights.reshape(-1)[chosen]
            value = expert_forward(
                module, hidden[rows], {name: getattr(module, name)[expert] for name in names}
            )
            keep = None if self.keep is None else self.keep[rows]
            if self.tracker is not None:
                self.tracker.add(expert, gates, value, keep)
            if self.vectors is not None:
                self.vectors.add(expert, value, keep)
            if self.sample is not None:
                self.sample.add(expert, gates, hidden[rows], keep)
            out.index_add_(0, rows, value.to(out.dtype) * gates.unsqueeze(-1).to(out.dtype))
        return out.to(hidden.dtype)


class SilentTap(Tap):
    """No experts at all: takes the tokens as they come, and gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = TokenRecorder()

    def take_logits(self, logits: Tensor) -> None:
        """[T, E] of the router, of the batch that comes next."""
        self.tokens.add_logits(logits, self.keep)

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H] of zeros."""
        self.tokens.add(hidden, index, weights, self.keep)
        return torch.zeros_like(hidden)


class MappedTap(Tap):
    """Prototypes in place of experts, as the map of one layer says.

    Args:
        slots: the layer's map.
        prototypes: prototype number -> its parts as a record holds them; quantised ones are expanded one at a time.
        is_open: one flag a router slot: whether the router may choose it; ``None`` where it may choose all.
    """

    def __init__(
        self,
        slots: SlotTensors,
        prototypes: Mapping[int, Mapping[str, Tensor]],
        is_open: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        self._slots = slots
        self._prototypes = prototypes
        self._closed = None if is_open is None else torch.tensor([not one for one in is_open])

    @classmethod
    def of(
        cls,
        slots: Sequence[SlotRecord],
        prototypes: Mapping[ExpertId, Mapping[str, Tensor]],
        constants: Tensor | None,
        layer: int = 0,
        is_open: Sequence[bool] | None = None,
    ) -> MappedTap:
        """From the records of a layer; ``prototypes`` has every one that they name."""
        names = sorted(prototypes)
        slot_map = SlotMap.of(layer, slots, {name: number for number, name in enumerate(names)})
        tensors = SlotTensors.of(slot_map, constants, torch.device("cpu"))
        return cls(
            tensors, {number: prototypes[name] for number, name in enumerate(names)}, is_open
        )

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """sum over p of alpha_p p(h), plus the gated constants."""
        if self._closed is not None:
            self._check(index, self._closed)
        self._slots = self._slots.to(hidden.device)
        routes = self._slots.routes(index, weights)
        out = torch.zeros(hidden.shape, dtype=sum_dtype(hidden), device=hidden.device)
        for position, number in enumerate(routes.prototypes):
            span = slice(routes.starts[position], routes.starts[position + 1])
            rows = routes.rows[span]
            parts = decode(self._prototypes[number], hidden.dtype, bool(module.is_transposed))
            value = expert_forward(module, hidden[rows], parts)
            out.index_add_(
                0, rows, value.to(out.dtype) * routes.weights[span].unsqueeze(-1).to(out.dtype)
            )
        self._slots.add_constants(out, index, weights)
        return out.to(hidden.dtype)

    def _check(self, index: Tensor, closed: Tensor) -> None:
        """Whatever a router does, a package whose receipt is taken is what its manifest says."""
        inside = (index >= 0) & (index < len(closed))
        if bool(closed.to(index.device)[index[inside]].any()):
            raise UnsupportedModel(
                "The router of this model cannot be kept from choosing an expert that was removed.",
                "it does not choose by topk, max or argmax alone",
                "choose a method that leaves the router alone, such as --method conmoe",
            )


def expert_sum(module: nn.Module, tap: Tap, tokens: LayerTokens, device: torch.device) -> Tensor:
    """[T, H]: what a tap computes for tokens that were taken before, a batch at a time."""
    out = []
    for start in range(0, len(tokens), _BATCH):
        rows = slice(start, start + _BATCH)
        hidden = tokens.hidden[rows].to(device)
        slots, gates = tokens.slots[rows].to(device), tokens.gates[rows].to(device)
        out.append(tap.forward(module, hidden, slots, gates).cpu())
    return torch.cat(out)


def _forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    tap: Tap = module._conmoe_tap  # type: ignore[assignment]
    start = time.perf_counter()
    out = tap.forward(module, hidden, index, weights)
    tap.seconds += time.perf_counter() - start
    return out


def register() -> None:
    """Make transformers know the function; calling it again does nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def attach(module: nn.Module, tap: Tap) -> None:
    """Let ``tap`` compute the experts of ``module``."""
    module._conmoe_tap = tap  # type: ignore[assignment]
