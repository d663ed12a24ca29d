"""What an expert loses in each of the records that it may become: fewer neurons, and few bits for those that stay.

The squared error of its output on its tokens is taken as a sum,

    C(w, b, b') = C_trim(w) + f_in(b) E_in(w) + f_down(b') E_down(w),

C_trim from ``narrowing.py``. E_down(w) is what noise of the size of the weights costs where every column makes up for
those before it: |W_w|^2 / w times the sum of the pivots of the Gram matrix of the activations, over the w neurons that
stay. E_in is measured: gate and up rounded to the nearest in ``_COARSE``, on some tokens and some neurons, the change
of each times the length of its column of the down projection; of w neurons it is their share of the output. f_in(b) and
f_down(b') are measured on the layer itself: ``MEASURED`` experts, from the one with the most output to one with little,
are rounded the way packages are, some rows of each matrix, and the mean of error over E is taken.

Peak memory: four [H, H] in fp32 for each of the experts that go side by side, and what ``round_matrix`` takes for
``ROWS`` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import DOWN, SCALE, Kind, best_kind
from conmoe_edge.checkpoint.format.manifest import RecordLayout
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.checkpoint.format.records import form_of
from conmoe_edge.compress.methods.few_bits import common_gram
from conmoe_edge.compress.methods.interface import Parts, ScopeView
from conmoe_edge.compress.methods.narrowing import Narrowing
from conmoe_edge.compress.methods.rebuild import down_rows
from conmoe_edge.compress.solvers.error_feedback import DAMPING, Inputs
from conmoe_edge.compress.solvers.gram_matrix import gram as gram_of
from conmoe_edge.compress.solvers.neuron_pruning import take_neurons
from conmoe_edge.compress.solvers.rounding import FED_BACK, inputs_of, round_for
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.work.side_by_side import side_by_side
from conmoe_edge.model.experts import inner_activations

MEASURED = 4
"""Experts that are rounded to see what a form loses."""
ROWS = 64
"""Neurons, and rows of a down projection, that are measured of an expert."""
TOKENS = 128
"""Tokens of an expert that changes of gate and up are measured on."""
_COARSE: Kind = "q3"


def option_errors(
    scope: ScopeView,
    tokens: LayerTokens,
    gates: Tensor,
    grams: Sequence[Tensor],
    narrowed: Sequence[Narrowing],
) -> list[list[float]]:
    """Of every expert of a layer, the error of each of ``scope.options``.

    Args:
        scope: of one layer.
        tokens: of the layer.
        gates, grams: as ``narrowings`` takes and gives them.
        narrowed: what ``narrowings`` found on the same tokens.
    """
    forms = _forms(scope)

    def of(expert: int) -> tuple[_Inputs, float, _Down]:
        sample = _Inputs.of(scope, tokens, gates, expert)
        error = sample.changed(lambda weight: _nearest(weight, _COARSE))
        return sample, error, _Down.of(scope, expert, grams[expert])

    found = side_by_side(of, range(len(scope.pool)))
    samples = [sample for sample, _, _ in found]
    inputs = [error for _, error, _ in found]
    downs = [down for _, _, down in found]
    factors = _Factors.measured(scope, tokens, gates, forms, samples, inputs, downs, narrowed)
    places = {width: place for place, width in enumerate(scope.widths)}
    return [
        [
            trim.errors[1 + places[option.width]]
            + factors.inputs[forms[option.width, option.kind][0]]
            * own
            * down.share(trim.neurons[places[option.width]])
            + factors.down[forms[option.width, option.kind][1]]
            * down.noise(trim.neurons[places[option.width]])
            for option in scope.options
        ]
        for trim, own, down in zip(narrowed, inputs, downs, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Some neurons of one expert on some of its tokens; ``scale`` makes sums over them those over all.

    ``lengths`` [S]: of the neurons' columns of the down projection, squared, times ``scale``.
    """

    scope: ScopeView
    hidden: Tensor
    gates: Tensor
    parts: Parts
    lengths: Tensor
    exact: Tensor

    @classmethod
    def of(cls, scope: ScopeView, tokens: LayerTokens, gates: Tensor, expert: int) -> _Inputs:
        rows = gates[:, expert].nonzero().squeeze(1)
        picked = rows[_spread(len(rows), TOKENS)]
        down = down_rows(scope, expert)
        neurons = _spread(down.shape[1], ROWS)
        parts = take_neurons(scope.module, scope.weights.parts(scope.pool[expert]), neurons)
        hidden = tokens.hidden[picked].to(scope.device, scope.dtype)
        scale = len(rows) / max(1, len(picked)) * down.shape[1] / len(neurons)
        lengths = down[:, neurons].square().sum(0) * scale
        found = cls(scope, hidden, gates[picked, expert], parts, lengths, torch.empty(0))
        return cls(scope, hidden, found.gates, parts, lengths, found.activations(parts))

    def activations(self, parts: Parts) -> Tensor:
        """fp32 [n, S] on the host, times the gates."""
        scope = self.scope
        moved = {name: one.to(scope.device, scope.dtype) for name, one in parts.items()}
        inner = inner_activations(scope.module, self.hidden, moved, scope.dtype)
        return inner.float().cpu() * self.gates.unsqueeze(1)

    def changed(self, rounded: Callable[[Tensor], Tensor]) -> float:
        """The squared error of the output with all matrices [rows, columns] but the down projection ``rounded``."""
        transposed = bool(self.scope.module.is_transposed)
        changed = dict(self.parts)
        for name, weight in self.parts.items():
            if weight.dim() == 2 and name != DOWN:
                wide = rounded(weight.T if transposed else weight)
                changed[name] = wide.T if transposed else wide
        apart = (self.activations(changed) - self.exact).square().sum(0)
        return float((apart * self.lengths).sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class _Down:
    """A down projection: its ``gram``, and of every neuron the squared length of its column, the ``pivots`` and its
    part of the output. Its weights are taken from the layer when they are needed.
    """

    scope: ScopeView
    expert: int
    gram: Tensor
    columns: Tensor
    pivots: Tensor
    output: Tensor

    @classmethod
    def of(cls, scope: ScopeView, expert: int, gram: Tensor) -> _Down:
        weight = down_rows(scope, expert)
        columns = weight.square().sum(0)
        return cls(scope, expert, gram, columns, _pivots(gram), columns * gram.diagonal())

    def noise(self, neurons: Tensor) -> float:
        """E_down."""
        return float(self.columns[neurons].mean() * self.pivots[neurons].sum())

    def share(self, neurons: Tensor) -> float:
        """Of the output of all neurons, counted one by one, that of some."""
        return float(self.output[neurons].sum() / self.output.sum().clamp_min(1e-30))

    def rounded(self, kind: Kind, inputs: Inputs) -> float:
        """The error of some rows in a form, as that of all; ``inputs``: ``gram``, with what is found of it."""
        weight = down_rows(self.scope, self.expert)
        rows = _spread(len(weight), ROWS)
        part = weight[rows]
        apart = part - _as_packages_have(part, inputs, kind)
        error = ((apart @ self.gram) * apart).sum(dtype=torch.float64)
        return float(error) * len(weight) / len(rows)


@dataclass(frozen=True, slots=True)
class _Factors:
    """What each form loses, of E."""

    inputs: Mapping[Kind, float]
    down: Mapping[Kind, float]

    @classmethod
    def measured(
        cls,
        scope: ScopeView,
        tokens: LayerTokens,
        gates: Tensor,
        forms: Mapping[tuple[int, str], tuple[Kind, Kind]],
        samples: Sequence[_Inputs],
        inputs: Sequence[float],
        downs: Sequence[_Down],
        narrowed: Sequence[Narrowing],
    ) -> _Factors:
        common = common_gram([(tokens.hidden, gates.square().sum(1).sqrt())], len(scope.pool))
        order = sorted(range(len(narrowed)), key=lambda one: (-narrowed[one].errors[0], one))
        there = [one for one in order if inputs[one] > 0]
        picked = [there[int(place)] for place in _spread(len(there), MEASURED)]

        def of(expert: int) -> tuple[dict[Kind, float], dict[Kind, float]]:
            rows = gates[:, expert].nonzero().squeeze(1)
            moments = gram_of(tokens.hidden[rows], gates[rows, expert])
            own = inputs_of(moments.unsqueeze(0), common)
            lost: dict[Kind, float] = {
                kind: samples[expert].changed(_rounding(own, kind)) / inputs[expert]
                for kind in _distinct(forms, 0)
            }
            down = downs[expert]
            whole = down.noise(torch.arange(len(down.columns)))
            inside = inputs_of(down.gram.unsqueeze(0))
            below: dict[Kind, float] = {
                kind: down.rounded(kind, inside) / whole for kind in _distinct(forms, 1)
            }
            return lost, below

        found = side_by_side(of, picked)
        return cls(
            _means([lost for lost, _ in found], _distinct(forms, 0)),
            _means([below for _, below in found], _distinct(forms, 1)),
        )


def _forms(scope: ScopeView) -> dict[tuple[int, str], tuple[Kind, Kind]]:
    """What the gate and up, and the down projection are stored in, in every option."""
    assert scope.record is not None

    def forms(layout: RecordLayout) -> tuple[Kind, Kind]:
        named = [
            part.name.removesuffix(SCALE) for part in layout.parts if part.name.endswith(SCALE)
        ]
        first = next(name for name in named if name != DOWN)
        return form_of(layout, first), form_of(layout, DOWN)

    return {
        (one.width, one.kind): forms(scope.record(one.width, one.kind)) for one in scope.options
    }


def _rounding(inputs: Inputs, kind: Kind) -> Callable[[Tensor], Tensor]:
    return lambda weight: _as_packages_have(weight, inputs, kind)


def _as_packages_have(weight: Tensor, inputs: Inputs, kind: Kind) -> Tensor:
    """fp32 [R, K], rounded as it will be."""
    rows, columns = weight.shape
    own = best_kind(rows, columns, kind)
    if own in FED_BACK:
        return round_for(weight.unsqueeze(0), inputs, own)[0].dequantise()
    return _nearest(weight, own)


def _nearest(weight: Tensor, kind: Kind) -> Tensor:
    rows, columns = weight.shape
    return quantise(weight, best_kind(rows, columns, kind)).dequantise()


def _pivots(gram: Tensor) -> Tensor:
    """fp32 [I]: what is left of a column's square where those behind it have made up for it."""
    ridged = gram.clone()
    mean = gram.diagonal().mean()
    ridged.diagonal().add_(DAMPING * mean if float(mean) > 0 else 1.0)
    factor = torch.linalg.cholesky(ridged.flip(0, 1))
    return factor.diagonal().square().flip(0)


def _spread(count: int, most: int) -> Tensor:
    """At most so many of ``count`` places, evenly; a multiple of 16 where that leaves any."""
    wanted = min(count, most)
    if most >= ROWS and wanted > 16:
        wanted -= wanted % 16
    return torch.arange(wanted) * count // max(1, wanted)


def _means(found: Sequence[Mapping[Kind, float]], kinds: Sequence[Kind]) -> dict[Kind, float]:
    """0 where no expert was there to be measured: nothing comes to any."""
    return {kind: sum(one[kind] for one in found) / max(1, len(found)) for kind in kinds}


def _distinct(forms: Mapping[tuple[int, str], tuple[Kind, Kind]], at: int) -> list[Kind]:
    """The forms of the inputs (0) or of the down projection (1), each once."""
    found: list[Kind] = []
    for pair in forms.values():
        if pair[at] not in found:
            found.append(pair[at])
    return found
