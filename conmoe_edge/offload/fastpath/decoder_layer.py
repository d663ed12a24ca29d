"""A decoder layer for one new token, in one call of the operator wherever all its prototypes are there.

That is norm, attention, sum, norm, router (``fused_router.py``), experts and dense layers (``feed_forward.py``), sum.
Where the router has chosen a prototype that is not there, the call ends before the experts, and they go through the
cache. Where the router is another one, or has hooks, it is called as the model has it, between two calls of the
operator; and so is what else may stand behind the second norm: experts that the operator does not take, say. Every step
in Python and every small tensor operation that is saved is a cold one (``attention.py``).

As there, a layer has computed a token both ways, to the same bits, before the operator answers.

Memory: as ``attention.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from conmoe_edge.compat import cache_of
from conmoe_edge.offload.fastpath.attention import FusedAttention, Place, Rehearsal, unchanged
from conmoe_edge.offload.fastpath.feed_forward import Prepared, feed_forward
from conmoe_edge.offload.fastpath.report import Served, warn_of_another_result
from conmoe_edge.offload.fastpath.rms_norm import FusedNorm
from conmoe_edge.offload.fastpath.supported import Layer, Refusal, look_up
from conmoe_edge.offload.kernels.cpu.bindings import (
    BlockTable,
    Cached,
    Operator,
    Positions,
    RouterTable,
)


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a layer needs for the next token, but for its activations. ``router``: where it has been looked at."""

    cache: Any
    place: Place
    table: BlockTable
    behind: Prepared | None
    router: RouterTable | None = None


class Apart(Exception):
    """A token has to go through the model by itself."""


class Gathered(Exception):
    """A token has been through all layers of a meeting, and nothing was computed yet."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a layer is called with for one token of one answer."""

    layer: FusedLayer
    x: Tensor
    positions: Positions
    ready: _Ready
    router: RouterTable | None


class Meeting:
    """What all layers of a model know of a step that several answers share (``together.py``).

    Attributes:
        last: the number of layers.
        entries: while tokens are gathered, what the layers are called with for the present one.
        over: whether the layers have computed, and hand out what they have.
        result: then, what comes out of the last layer for the present answer.
    """

    def __init__(self) -> None:
        self.last = 0
        self.entries: list[Entry] | None = None
        self.over = False
        self.result: Tensor | None = None
        self._left = 0

    def enter(self, entry: Entry) -> Tensor:
        """Instead of the layer's result its input goes on to the next one, which has to get that very tensor.

        Raises:
            Apart: something stands between two layers.
            Gathered: this was the last one.
        """
        entries = self.entries
        assert entries is not None, "it was looked at"
        if entries and entry.x is not entries[0].x:
            raise Apart
        entries.append(entry)
        if len(entries) == self.last:
            raise Gathered
        return entry.x

    def leave(self, layer: FusedLayer, args: tuple[Any, ...]) -> Tensor:
        """What the layer gives when everything was computed: its input, and the last one the result."""
        self._left += 1
        if self._left < self.last:
            return args[0]
        self._left = 0
        assert self.result is not None, "it is there when the meeting is over"
        return self.result

    def end(self) -> None:
        """Layers compute again."""
        self.entries, self.over, self.result, self._left = None, False, None, 0


class Checked:
    """Arguments of layers that were looked at, and taken: a model gives layers of one kind the same."""

    def __init__(self) -> None:
        self._embeddings: Any = None
        self._taken: list[tuple[Any, Any, int, Positions]] = []

    def find(self, arguments: Mapping[str, Any], spec: Any) -> Positions | None:
        """The position, where ``arguments`` were taken before for an attention of the kind ``spec``."""
        if arguments.get("position_embeddings") is not self._embeddings:
            return None
        mask, count = arguments.get("attention_mask"), len(arguments)
        for other_mask, other_spec, other_count, positions in self._taken:
            if mask is other_mask and spec is other_spec and count == other_count:
                return positions
        return None

    def keep(self, arguments: Mapping[str, Any], spec: Any, positions: Positions) -> None:
        """``arguments`` were taken."""
        embeddings = arguments["position_embeddings"]
        if embeddings is not self._embeddings:
            self._embeddings, self._taken = embeddings, []
        self._taken.append((arguments.get("attention_mask"), spec, len(arguments), positions))


class FusedLayer:
    """Stands in front of the ``forward`` of a decoder layer of a loaded model, for inference only.

    ``verified``: whether the operator computed the same as transformers; ``None`` before there was a token to try.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: Layer,
        engine: Operator,
        checked: Checked,
        served: Served,
        meeting: Meeting,
    ) -> None:
        """For a module that ``fused_layer`` takes."""
        self.verified: bool | None = None
        self._tried_all = self._one_call = False
        self._own = weakref.WeakMethod(module.forward)
        self._engine, self._checked, self._served = engine, checked, served
        self._meeting = meeting
        self._parts = parts = dict(module.named_children())
        names = (spec.before, spec.attended, spec.after, spec.given)
        self._norms: list[FusedNorm | None] = [parts.get(name) for name in names]  # pyright: ignore[reportAttributeAccessIssue]
        self._attending = parts[spec.attention]
        self._attention: FusedAttention = vars(self._attending)["forward"]
        self._mlp = parts[spec.mlp]
        self._beside = parts.get(spec.shared)
        self._multiplier = float(getattr(module, spec.multiplier)) if spec.multiplier else 1.0
        self._behind = feed_forward(self._mlp, self._beside, engine)
        dense = not isinstance(self._behind, Refusal) and self._behind.dense
        self._exact = self._attention.exact and not dense
        self._table: tuple[Any, BlockTable] | None = None
        self._ready: _Ready | None = None
        self._standing: tuple[BlockTable, Prepared, RouterTable | None] | None = None
        self._written: _Ready | None = None

    @property
    def spec(self) -> Any:
        """Of its attention: layers that share it have the positions of a token in common."""
        return self._attention.spec

    def why_not_one_call(self) -> str:
        """Why not all of the layer is part of the call; empty where it is."""
        return self._behind.reason if isinstance(self._behind, Refusal) else self._behind.why_not()

    def prepare(self, cache: Any) -> None:
        """For a token that comes next, behind those in ``cache``; with ``None`` for anything else."""
        self._ready = self._written = None
        own = self._own()
        if cache is None or own is None or False in (self.verified, self._attention.verified):
            return
        for one in self._norms:
            if one is not None and one.current() is None:
                return
        place = self._attention.place(cache)
        if place is None or not unchanged(own.__self__, self._parts):
            return
        table = self._block_table(place)
        if table is None:
            return
        behind = None if isinstance(self._behind, Refusal) else self._behind.prepare()
        if self._tried_all != (behind is not None):
            self._tried_all, self.verified = behind is not None, None
        self._ready = _Ready(cache, place, table, behind)
        self._standing = None
        if behind is not None and not isinstance(self._behind, Refusal):
            self._standing = (table, behind, self._behind.router())

    def prepare_again(self, cache: Any, window: bool) -> bool:
        """``prepare`` for a layer that could go alone before, with a ``window`` in the cache or not, and of which no
        part has changed since; whether it still can.
        """
        standing, behind = self._standing, self._behind
        if standing is None or isinstance(behind, Refusal) or not behind.still_has(standing[1]):
            return False
        table, prepared, router = standing
        if table.attention is None or (router is None and behind.gate is not None):
            return False
        place = self._attention.place_with(table.attention, cache)
        if place is None or isinstance(place.layer, DynamicSlidingWindowLayer) is not window:
            return False
        self._ready = _Ready(cache, place, table, prepared, router)
        return True

    def _block_table(self, place: Place) -> BlockTable | None:
        if self._table is None or self._table[0] is not place.table:
            norms = [None if one is None else one.current() for one in self._norms]
            before, attended, after, given = norms
            try:
                made = BlockTable(
                    *(place.table, before, after),
                    attended=attended,
                    given=given,
                    multiplier=self._multiplier,
                )
            except ValueError:
                self.verified = False
                return None
            self._table = (place.table, made)
        return self._table[1]

    def finish(self, through: bool) -> None:
        """The forward has ended. Where the token went ``through`` the whole model, it is in the cache."""
        if through and self._written is not None:
            self._written.place.has_one_more()
        self._ready = self._written = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: [B, T, H] ... -> [B, T, H]."""
        ready, self._ready = self._ready, None
        own = self._own()
        assert own is not None, "the module is being called, so it is there"
        if self._meeting.over:
            return self._meeting.leave(self, args)
        positions = None if ready is None else self._positions(ready, args, kwargs)
        if self._meeting.entries is not None:
            return self._meeting.enter(self._entry(own.__self__, ready, positions, args))
        if ready is None or positions is None:
            return own(*args, **kwargs)
        x: Tensor = args[0]
        if self.verified is None:
            tried = self._try(own.__self__, lambda: own(*args, **kwargs), x, positions, ready)
            if not self.verified:
                return tried
        out = self._compute(x.contiguous(), positions, ready, ready.place.cached)
        self._written = ready
        if self._one_call:
            self._served.layers += 1
        else:
            self._served.blocks += 1
        return out

    def may_go_alone(self, module: nn.Module, cache: Any, window: bool) -> bool:
        """Whether the layer is ready for the next token of ``cache``, in which it has a ``window`` or not, and would
        compute it in one call of the operator, whatever its model hands on to it.
        """
        ready, behind, attention = self._ready, self._behind, self._attention
        if ready is None or ready.behind is None or isinstance(behind, Refusal):
            return False
        if self.verified is not True or ready.cache is not cache:
            return False
        if behind.gate is not None and behind.router() is None:
            return False
        if isinstance(ready.place.layer, DynamicSlidingWindowLayer) is not window:
            return False
        fronts = vars(module).get("forward"), self._attending.__dict__.get("forward")
        return fronts == (self, attention) and attention.settings_hold

    @property
    def settings_hold(self) -> bool:
        """As of its attention."""
        return self._attention.settings_hold

    def place_of(self, angles: Mapping[str, Any]) -> Positions | None:
        """The position of a token with which the layer ``may_go_alone``, as ``FusedAttention.positions``."""
        assert self._ready is not None, "may_go_alone has looked"
        return self._attention.positions(angles, self._ready.place)

    def alone(self, module: nn.Module, x: Tensor, positions: Positions) -> Tensor:
        """The layer for a token with which it ``may_go_alone``, bf16 [1, 1, H] -> the same.

        Raises:
            Apart, Gathered: the token is one that several answers share a step for.
        """
        ready, self._ready = self._ready, None
        assert ready is not None, "may_go_alone has looked"
        if self._meeting.entries is not None:
            return self._meeting.enter(self._entry(module, ready, positions, (x,)))
        out = self._compute(x, positions, ready, ready.place.cached)
        self._written = ready
        self._served.layers += 1
        return out

    def _positions(
        self, ready: _Ready, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Positions | None:
        """The token's position; ``None`` where the operator does not take what the layer is called with."""
        if len(args) != 1 or cache_of(kwargs) is not ready.cache:
            return None
        x: Tensor = args[0]
        attention = self._attention
        positions = self._checked.find(kwargs, attention.spec)
        if positions is None:
            if attention.takes(x, kwargs):
                positions = attention.positions(kwargs, ready.place)
            if positions is None:
                return None
            self._checked.keep(kwargs, attention.spec, positions)
        if x.dtype != torch.bfloat16 or x.numel() != ready.place.table.hidden:
            return None
        if self._attending.__dict__.get("forward") is not attention:
            return None  # its forward was replaced after loading
        return positions

    def _entry(
        self, module: nn.Module, ready: _Ready | None, positions: Positions | None, args: Any
    ) -> Entry:
        """The token, to be computed with others.

        Raises:
            Apart: it has to go by itself.
        """
        behind = self._behind
        if ready is None or positions is None or isinstance(behind, Refusal):
            raise Apart
        if self.verified is not True or ready.behind is None:
            raise Apart
        router = ready.router or behind.router()
        if (router is None and behind.gate is not None) or module._forward_hooks:
            raise Apart
        return Entry(self, args[0], positions, ready, router)

    def together(self, entries: Sequence[Entry], x: Tensor) -> Tensor:
        """The layer for one token each of several answers, [T, H] -> [T, H], with the bits that each has alone. Their
        keys and values are written; they count once ``took`` is called.
        """
        behind, engine, first = self._behind, self._engine, entries[0]
        ready = first.ready
        assert not isinstance(behind, Refusal) and ready.behind is not None, "_entry has looked"
        where = [(one.positions, one.ready.place.cached) for one in entries]
        found = behind.decoder_together(ready.behind, ready.table, first.router, x, where, engine)
        if found.out is not None:
            return found.out
        given = behind.output_together(ready.behind, found, engine)
        norm = self._norms[3]
        if norm is not None:
            now = norm.current()
            assert now is not None, "prepare has looked"
            given = engine.rms_norm(now, given)
        return found.summed + (given if self._multiplier == 1.0 else given * self._multiplier)

    def _try(
        self,
        module: nn.Module,
        own: Callable[[], Any],
        x: Tensor,
        positions: Positions,
        ready: _Ready,
    ) -> Any:
        """The token by transformers, and beside it by the operator with what the router said (or with what stands in
        the experts' place gave), to see whether they are the same. Where they are, the token is taken back.
        """
        routed: list[Any] = []
        behind = self._behind
        gate = None if isinstance(behind, Refusal) or ready.behind is None else behind.gate
        known = self._mlp if gate is None else gate
        hook = known.register_forward_hook(lambda *call: routed.append(call[2]))
        rehearsal, counted = Rehearsal(ready.place.layer), self._served.attention
        try:
            wanted = own()
        finally:
            hook.remove()
        self.verified = (
            isinstance(wanted, Tensor)
            and len(routed) == 1
            and rehearsal.agrees(
                lambda cached: self._compute(x.contiguous(), positions, ready, cached, routed[0]),
                wanted,
                self._exact,
            )
        )
        if self.verified:
            rehearsal.take_back()
            self._served.attention = counted  # the token is counted where it is computed again
        else:
            warn_of_another_result(module)
        return wanted

    def _compute(
        self,
        x: Tensor,
        positions: Positions,
        ready: _Ready,
        cached: Cached,
        known: Any = None,
    ) -> Tensor:
        """``known``: what another router, or what stands in the experts' place, has given already."""
        behind, engine = self._behind, self._engine
        self._one_call = False
        if isinstance(behind, Refusal) or ready.behind is None:
            summed, normed = engine.block(ready.table, x, positions, cached)
            given = self._mlp(normed) if known is None else known
            given = given[0] if isinstance(given, tuple) else given
            if self._beside is not None:
                given = given + self._beside(normed)
            return self._add(summed, given)
        router = ready.router or behind.router()
        if router is not None or behind.gate is None:
            self._one_call = True
            out = behind.decoder(ready.behind, ready.table, router, x, positions, cached, engine)
            if out is not None:
                return out
            assert router is not None, "only prototypes can be absent"
            found = router.between
            routed = found.normed, found.slots, found.gates
            given = behind.output_with_misses(ready.behind, *routed, engine)
            return self._add(found.summed, given).view(x.shape)
        summed, normed = engine.block(ready.table, x, positions, cached)
        flat = normed.view(1, -1)
        routed = behind.route(flat) if known is None else known
        given = behind.output(ready.behind, flat, routed[2], routed[1], engine)
        return self._add(summed, given.view(x.shape))

    def _add(self, summed: Tensor, given: Tensor) -> Tensor:
        """The layer's last sum."""
        norm = self._norms[3]
        if norm is not None:
            given = norm(given)
        return summed + (given if self._multiplier == 1.0 else given * self._multiplier)


def fused_layer(
    module: nn.Module, engine: Operator, checked: Checked, served: Served, meeting: Meeting
) -> FusedLayer | Refusal:
    """What stands in front of ``module``'s ``forward``, whose norms and attention are the operator's already."""
    spec = look_up(module, Layer)
    if isinstance(spec, Refusal):
        return spec
    name, parts = type(module).__name__, dict(module.named_children())
    if spec.attention not in parts:
        return Refusal("")  # what stands there says why
    beside = {spec.shared} if spec.shared in parts else set()
    if set(parts) != {*spec.norms, spec.attention, spec.mlp} | beside:
        return Refusal(f"{name} has other parts than its class")
    if not all(isinstance(parts[one], FusedNorm) for one in spec.norms):
        return Refusal(f"a norm of {name} is not the operator's")
    if not isinstance(vars(parts[spec.attention]).get("forward"), FusedAttention):
        return Refusal("")  # its attention has said why
    return FusedLayer(module, spec, engine, checked, served, meeting)
