"""Layers of narrow experts in few bits as stand-ins for the whole one, to see what a division of bytes does.

Nothing is refitted but the down projection of an expert whose neurons go, and numbers are rounded to the nearest: more
is lost than in a package, in every layer about as much more.

Peak memory: the stand-ins of one division, where the tap of the one before is given up first; a Gram matrix [I, I] in
fp32 of every expert whose neurons go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from conmoe_edge.checkpoint.format.records import decode, encode
from conmoe_edge.checkpoint.format.slot_map import NONE
from conmoe_edge.compress.methods.interface import Parts, ScopeView
from conmoe_edge.compress.methods.narrowing import Narrowing, narrowings
from conmoe_edge.compress.methods.option_costs import option_errors
from conmoe_edge.compress.methods.rebuild import (
    activations,
    gates_of,
    solved,
    whole_width,
    with_down,
)
from conmoe_edge.compress.solvers.facility import slot_map_of
from conmoe_edge.compress.solvers.record_menu import Menu
from conmoe_edge.compress.solvers.widths import choose, layer_curve
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stream.expert_hooks import MappedTap
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.plan.record_options import RecordOption

Record = tuple[int, str]
"""The place of an expert's width among those of the scope, from 1 on, 0 where it goes; and its kind, where they differ.
"""


@dataclass(frozen=True, slots=True)
class NarrowedLayer:
    """What the experts of one layer lose with no neuron, and in the records that they may have.

    ``widths``: of the scope. ``sizes``: bytes of their records, where all are of one kind. ``unit``: bytes that are
    given at once; ``units``: of all experts. ``menu`` and ``options``: where kinds differ.
    """

    experts: tuple[Narrowing, ...]
    widths: tuple[int, ...]
    sizes: tuple[int, ...]
    unit: int
    units: int
    menu: Menu | None = None
    options: tuple[RecordOption, ...] = ()

    def curve(self) -> tuple[float, ...]:
        """The error that is left in 0, 1, ... units."""
        if self.menu is not None:
            return self.menu.curve(self.unit, self.units)
        return layer_curve([one.errors for one in self.experts], self.sizes, self.unit, self.units)

    def chosen(self, units: int) -> list[Record]:
        """What every expert becomes in so many units."""
        if self.menu is None:
            errors = [one.errors for one in self.experts]
            return [(place, "") for place in choose(errors, self.sizes, units * self.unit)]
        found = self.menu.chosen(units * self.unit)
        assert found is not None, "every expert may go"
        taken = [None if one < 0 else self.options[one] for one in found]
        return [
            (0, "") if one is None else (1 + self.widths.index(one.width), one.kind)
            for one in taken
        ]


class StandInLayer:
    """A loaded layer and its tokens, from which stand-ins are made.

    An expert keeps the neurons that are worth most, its down projection making up for the others; one that has gone
    gives nothing.

    Args:
        scope: of the layer alone.
        tokens: that stand-ins are made from.
        unit: bytes that are given at once.
    """

    def __init__(self, scope: ScopeView, tokens: LayerTokens, unit: int) -> None:
        self._scope, self._tokens, self._unit = scope, tokens, unit
        self._gates = gates_of(tokens, len(scope.pool))
        self._grams: dict[int, Tensor] = {}
        self._made: dict[tuple[int, Record], Parts] = {}  # neighbours have much in common

    @property
    def index(self) -> int:
        """The decoder layer."""
        return self._scope.layers[0].layer

    @property
    def module(self) -> nn.Module:
        """The loaded experts of the layer."""
        return self._scope.module

    def narrowed(self) -> NarrowedLayer:
        """What its experts lose, by its tokens."""
        scope = self._scope
        grams, found = narrowings(scope, self._tokens, self._gates)
        self._grams.update(enumerate(grams))
        menu, largest = None, scope.sizes[-1]
        if scope.options:
            errors = option_errors(scope, self._tokens, self._gates, grams, found)
            nothing = [one.errors[0] for one in found]
            nbytes = [one.nbytes for one in scope.options]
            menu = Menu.of(nbytes, errors, nothing, scope.gone)
            largest = menu.sizes[-1]
        units = len(found) * largest // self._unit
        sizes = (0, *scope.sizes)
        return NarrowedLayer(
            tuple(found), scope.widths, sizes, self._unit, units, menu, scope.options
        )

    def tap(self, narrowed: NarrowedLayer, units: int) -> MappedTap:
        """The layer in so many units. What the tap before had and this one has not is given up."""
        return self._tap(narrowed.experts, narrowed.chosen(units))

    def _tap(self, experts: Sequence[Narrowing], chosen: Sequence[Record]) -> MappedTap:
        parts, wanted = {}, set(enumerate(chosen))
        self._made = {key: one for key, one in self._made.items() if key in wanted}
        for expert, record in enumerate(chosen):
            place, kind = record
            if place:
                if (expert, record) not in self._made:
                    neurons = experts[expert].neurons[place - 1]
                    self._made[expert, record] = self._parts(expert, neurons, kind)
                parts[expert] = self._made[expert, record]
        targets = [expert if place else NONE for expert, (place, _) in enumerate(chosen)]
        slot_map = slot_map_of(self._scope.layers[0].layer, targets)
        return MappedTap(SlotTensors.of(slot_map, None, self._scope.device), parts)

    def _parts(self, expert: int, neurons: Tensor, kind: str) -> Parts:
        """In the model's own numbers, so that a whole expert is no copy."""
        scope = self._scope
        own = scope.weights.parts(scope.pool[expert])
        found = own
        if len(neurons) != whole_width(scope):
            if expert not in self._grams:
                alpha = self._gates[:, expert]
                self._grams[expert] = activations(scope, self._tokens, expert, alpha).gram
            _, down = solved(scope, expert, self._grams[expert], neurons)
            found = with_down(scope, expert, neurons, down)
        elif not kind:
            return own
        if kind:
            assert scope.record is not None
            transposed = bool(scope.module.is_transposed)
            encoded = encode(scope.record(len(neurons), kind), found, transposed)
            found = decode(encoded, scope.dtype, transposed)
        return {name: part.to(own[name].device, own[name].dtype) for name, part in found.items()}
