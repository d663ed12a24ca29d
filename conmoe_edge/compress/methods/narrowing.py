"""What every expert of a layer loses with fewer neurons, and layers of narrow experts as stand-ins for the whole one.

For an expert e with activations v(t) = g(t) a(t) on its tokens, a constant c that its router slot gives as g(t) c takes
one direction out of them: with m = sum of g v / sqrt(sum of g^2), errors are measured on the Gram matrix
G = sum of v v^T - m m^T.  With no neuron left the error is tr(W G W^T), that of the best constant. The ridge beside G
is worth the activations of ``PRIOR`` tokens, so that an expert with few tokens does not seem to need few neurons; with
a larger ridge every neuron looks dear, and whole experts go instead.

A down projection with more than ``slot_errors.SKETCH`` rows is sketched as outputs are there.

Peak memory: one [I, I] in fp32 an expert, and the activations of one expert on its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.slot_map import NONE
from conmoe_edge.compress.methods.interface import Parts, ScopeView
from conmoe_edge.compress.methods.rebuild import (
    activations,
    down_rows,
    gates_of,
    solved,
    whole_width,
    with_down,
)
from conmoe_edge.compress.solvers.facility import slot_map_of
from conmoe_edge.compress.solvers.neuron_pruning import cuts
from conmoe_edge.compress.solvers.refit import Features
from conmoe_edge.compress.solvers.slot_errors import sketch
from conmoe_edge.compress.solvers.widths import choose, layer_curve
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stream.expert_hooks import MappedTap
from conmoe_edge.model.slot_tensors import SlotTensors

PRIOR = 1.0
_NEARLY_CONSTANT = 0.01
"""Where the difference is this share of the Gram matrix, its rounding shows: it is summed over tokens again."""


@dataclass(frozen=True, slots=True)
class Narrowing:
    """One expert: ``errors`` with no neuron and in every width of the scope; ``neurons`` of every width."""

    errors: tuple[float, ...]
    neurons: tuple[Tensor, ...]


def narrowings(
    scope: ScopeView, tokens: LayerTokens, gates: Tensor
) -> tuple[list[Tensor], list[Narrowing]]:
    """The Gram matrices [I, I] of all experts' activations, and what each expert loses in every width.

    Args:
        scope: of one layer.
        tokens: of the layer.
        gates: fp32 [T, E], the gate of every slot that a token chose, else 0.
    """
    grams, found = [], []
    for expert in range(len(scope.pool)):
        gate = gates[:, expert]
        one = activations(scope, tokens, expert, gate)
        grams.append(one.gram)
        found.append(narrowing(scope, expert, one, gate[one.rows]))
    return grams, found


def narrowing(scope: ScopeView, expert: int, own: Features, gates: Tensor) -> Narrowing:
    """What one expert loses in every width of the scope, by its activations on its tokens and their gates [n]."""
    down = down_rows(scope, expert)
    count, width = own.values.shape
    square = gates.square().sum().clamp(min=1e-30)
    middle = (gates @ own.values) / square.sqrt()
    gram = own.gram - torch.outer(middle, middle)
    if gram.diagonal().sum() < _NEARLY_CONSTANT * own.gram.diagonal().sum():
        rest = own.values - torch.outer(gates / square.sqrt(), middle)
        gram = rest.T @ rest
    matrix = sketch(len(down))
    if matrix is not None:  # columns keep their lengths, near enough
        down = matrix.T @ down
    found = cuts(gram, down, scope.widths, PRIOR * width / max(1, count))
    nothing = float(((down @ gram) * down).sum(dtype=torch.float64))
    return Narrowing(
        (max(nothing, found[0].error), *(one.error for one in found)),
        tuple(one.neurons for one in found),
    )


@dataclass(frozen=True, slots=True)
class NarrowedLayer:
    """What the experts of one layer lose with no neuron and in the widths that they may have.

    ``sizes``: bytes of the records; ``unit``: bytes that are given at once; ``units``: of all experts.
    """

    experts: tuple[Narrowing, ...]
    sizes: tuple[int, ...]
    unit: int
    units: int

    def curve(self) -> tuple[float, ...]:
        """The error that is left in 0, 1, ... units."""
        return layer_curve([one.errors for one in self.experts], self.sizes, self.unit, self.units)

    def chosen(self, units: int) -> list[int]:
        """The place of every expert's width in so many units."""
        return choose([one.errors for one in self.experts], self.sizes, units * self.unit)


class StandInLayer:
    """A loaded layer and its tokens, from which layers of narrow experts are made.

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
        self._made: dict[tuple[int, int], Parts] = {}  # divisions have much in common

    def narrowed(self) -> NarrowedLayer:
        """What its experts lose, by its tokens."""
        sizes = self._scope.sizes
        grams, found = narrowings(self._scope, self._tokens, self._gates)
        self._grams.update(enumerate(grams))
        units = len(found) * sizes[-1] // self._unit
        return NarrowedLayer(tuple(found), (0, *sizes), self._unit, units)

    def tap(self, narrowed: NarrowedLayer, units: int) -> MappedTap:
        """The layer in so many units."""
        parts, chosen = {}, narrowed.chosen(units)
        for expert, place in enumerate(chosen):
            if place:
                if (expert, place) not in self._made:
                    neurons = narrowed.experts[expert].neurons[place - 1]
                    self._made[expert, place] = self._parts(expert, neurons)
                parts[expert] = self._made[expert, place]
        targets = [expert if place else NONE for expert, place in enumerate(chosen)]
        slot_map = slot_map_of(self._scope.layers[0].layer, targets)
        return MappedTap(SlotTensors.of(slot_map, None, self._scope.device), parts)

    def _parts(self, expert: int, neurons: Tensor) -> Parts:
        """In the model's own numbers, so that a whole expert is no copy."""
        scope = self._scope
        own = scope.weights.parts(scope.pool[expert])
        if len(neurons) == whole_width(scope):
            return own
        if expert not in self._grams:
            alpha = self._gates[:, expert]
            self._grams[expert] = activations(scope, self._tokens, expert, alpha).gram
        _, down = solved(scope, expert, self._grams[expert], neurons)
        found = with_down(scope, expert, neurons, down)
        return {name: part.to(own[name].device, own[name].dtype) for name, part in found.items()}
