"""What runs in place of a layer's experts while a model is streamed.

One function is registered with transformers (``conmoe_fit``); it hands over to the tap that hangs
on the experts module: ``RoutedTap`` computes the layer's own experts and gathers statistics,
``MappedTap`` computes prototypes through the slot records of a written package. Both go expert by
expert in ascending order, so sums are the same on every run, and convert one expert at a time where
the weights have another dtype than the activations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.format.records import decode
from conmoe_edge.compress.stats.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.stats.mixed_precision import RowSample
from conmoe_edge.compress.stats.output_vectors import VectorTracker
from conmoe_edge.compress.stats.statistics import StatisticsTracker
from conmoe_edge.compress.stream.trace_recorder import RoutingRecorder
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.experts import (
    add_constants,
    expert_forward,
    merge_routes,
    part_names,
    sum_dtype,
)

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
        out = torch.zeros_like(hidden)
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
            if self.tracker is not None:
                self.tracker.add(
                    expert, gates, value, None if self.keep is None else self.keep[rows]
                )
            if self.vectors is not None:
                self.vectors.add(expert, value, None if self.keep is None else self.keep[rows])
            if self.sample is not None:
                self.sample.add(
                    expert, gates, hidden[rows], None if self.keep is None else self.keep[rows]
                )
            out.index_add_(0, rows, (value * gates.unsqueeze(-1)).to(out.dtype))
        return out


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
    """Prototypes in place of experts, as the slot records of one layer say.

    Args:
        slots: one record a router slot.
        prototypes: the parts of every prototype that the layer uses, as their records hold them; quantised ones are
            expanded one at a time.
        constants: [n, H] fp32, or ``None``.
        rerouted: the router must not choose slots with nothing behind them.
    """

    def __init__(
        self,
        slots: Sequence[SlotRecord],
        prototypes: Mapping[ExpertId, Mapping[str, Tensor]],
        constants: Tensor | None,
        rerouted: bool = False,
    ) -> None:
        super().__init__()
        self._closed = torch.tensor([rerouted and slot.dropped for slot in slots])
        self._order = sorted(prototypes)
        number = {expert: position for position, expert in enumerate(self._order)}
        self._parts = prototypes
        self._map = torch.tensor(
            [-1 if s.prototype is None else number[s.prototype] for s in slots]
        )
        self._scales = torch.tensor([s.scale for s in slots], dtype=torch.float32)
        self._constant_of = torch.tensor([-1 if s.constant is None else s.constant for s in slots])
        self._constants = constants

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """sum over p of alpha_p p(h), plus the gated constants."""
        device = hidden.device
        self._check(index)
        routes = merge_routes(index, weights, self._map.to(device), self._scales.to(device))
        out = torch.zeros(hidden.shape, dtype=sum_dtype(hidden), device=device)
        for position, number in enumerate(routes.prototypes):
            span = slice(routes.starts[position], routes.starts[position + 1])
            rows = routes.rows[span]
            parts = decode(
                self._parts[self._order[number]], hidden.dtype, bool(module.is_transposed)
            )
            value = expert_forward(module, hidden[rows], parts)
            out.index_add_(
                0, rows, value.to(out.dtype) * routes.weights[span].unsqueeze(-1).to(out.dtype)
            )
        if self._constants is not None:
            add_constants(
                out, index, weights, self._constants.to(device), self._constant_of.to(device)
            )
        return out.to(hidden.dtype)

    def _check(self, index: Tensor) -> None:
        """Whatever a router does, a package whose receipt is taken is what its manifest says."""
        if not bool(self._closed.any()):
            return
        inside = (index >= 0) & (index < len(self._closed))
        if bool(self._closed.to(index.device)[index[inside]].any()):
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
