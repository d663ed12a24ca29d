"""``auto``: neurons and experts kept where they are worth most, refitted layer after layer.

The layers are taken one after another on the stream of the package so far. Every layer aims at the *original* residual
stream behind it, so that it also makes up for what the layers before it lost:

1. Part of the reduction is neurons instead of experts. For every expert it is measured what removing
   neurons costs when the others make up for it (``narrowing.py``), and the bytes of the layer go to
   those experts where they save most (``widths.py``): prototypes have different widths, and an expert
   that is hardly worth a neuron goes. Super experts and the first of every domain keep at least half.
2. A slot whose expert has gone becomes prototype x scale + constant, or a constant alone, by the error
   that is measured in closed form (``slot_errors.py``). The router stays.
3. ``rebuild`` solves the down projections of all prototypes and the constants of all slots together.

Where all prototypes must have the same number of neurons, there are three candidates for who stays: by facility
location on the measured errors, by the energy of outputs, by REAP's criterion. Each is fitted on some of the
calibration sequences and measured on others, and the one with the least error (ties to the first) is fitted on all.

Unlike with ConMoE, weights of prototypes change. Parts of this are known: facility location and
replaceability from ConMoE (arXiv 2605.29350), constants from MoNE (2507.00390), least squares for the
down projection from MergeMoE (2510.14436), working on the compressed stream from REAM (2604.04356),
neurons as the unit from CAMERA-P and MoE-Slimming (2606.18304), the cost of a neuron from the optimal
brain surgeon. docs/auto.md says what it is worth.

Peak memory: that of ``rebuild`` beside the layer's tokens, and one [I, I] in fp32 an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.compress.methods.few_bits import feeds_back
from conmoe_edge.compress.methods.interface import Decision, Method, Needs, ScopeView, identity
from conmoe_edge.compress.methods.narrowing import narrowings
from conmoe_edge.compress.methods.option_costs import option_errors
from conmoe_edge.compress.methods.rebuild import (
    StandIns,
    error_on,
    gates_of,
    rebuild,
    whole_parts,
    whole_width,
)
from conmoe_edge.compress.solvers.facility import assign, must_stay, select, slot_map_of, strongest
from conmoe_edge.compress.solvers.record_menu import Menu
from conmoe_edge.compress.solvers.slot_errors import (
    SAMPLE_TOKENS,
    SlotErrors,
    routed_outputs,
    slot_errors,
)
from conmoe_edge.compress.solvers.widths import choose
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.model.experts import expert_forward
from conmoe_edge.plan.record_options import RecordOption

FITTED, MEASURED = 8192, 4096
"""Tokens that candidates are fitted on and measured on."""
_ENOUGH = ("int8", "q4", "q3-q4", "q3")
"""Kinds of record that an expert which has to stay may have."""
_VISITS = 128
"""Tokens that a slot without its expert is measured on, as a mean over them."""


def decide(scope: ScopeView, keep: int) -> Decision:
    """Prototypes, slots, constants and new weights of one layer: in ``scope.room`` bytes where that is given, else
    ``keep`` prototypes. Where there is one width only, all have it.
    """
    (layer,) = scope.layers
    tokens = layer.tokens
    assert tokens is not None and tokens.target is not None, (
        "auto needs the tokens and their target"
    )
    count, whole = len(scope.pool), scope.widths[-1] >= whole_width(scope)
    if scope.options:
        return _by_records(scope, tokens.weighted())
    if scope.room:
        keep = max(1, scope.room // scope.sizes[-1])
    if (
        whole
        and keep >= count
        and (scope.record is None or not feeds_back(scope.record(scope.widths[-1])))
    ):
        return identity(scope)
    tokens = tokens.weighted()
    if len(scope.widths) > 1:
        return _by_worth(scope, tokens)
    return _alike(scope, tokens, keep)


def _by_worth(scope: ScopeView, tokens: LayerTokens) -> Decision:
    """Prototypes of the widths that they are worth."""
    count = len(scope.pool)
    forward = _forward(scope)
    sample = tokens.sample(SAMPLE_TOKENS)
    seen = routed_outputs(sample, count, forward)
    place = next(n for n, one in enumerate(scope.widths, 1) if 2 * one >= scope.widths[-1])
    forced = must_stay(seen.energy, seen.peak, scope.room // scope.sizes[-1])
    least = [place if expert in forced else 0 for expert in range(count)]
    grams, narrowed = narrowings(scope, tokens, gates_of(tokens, count))
    chosen = choose([one.errors for one in narrowed], (0, *scope.sizes), scope.room, least)
    kept = [expert for expert in range(count) if chosen[expert]]
    slot_map = _slot_map(scope, tokens, forward, kept)
    neurons = {expert: narrowed[expert].neurons[chosen[expert] - 1] for expert in kept}
    return rebuild(scope, tokens, StandIns(slot_map, neurons), grams)


def _by_records(scope: ScopeView, tokens: LayerTokens) -> Decision:
    """Prototypes with the neurons and the bits that they are worth."""
    count, options = len(scope.pool), scope.options
    forward = _forward(scope)
    gates = gates_of(tokens, count)
    grams, narrowed = narrowings(scope, tokens, gates)
    errors = option_errors(scope, tokens, gates, grams, narrowed)
    nothing = [one.errors[0] for one in narrowed]
    sizes = [one.nbytes for one in options]
    seen = routed_outputs(tokens.sample(SAMPLE_TOKENS), count, forward)
    forced = must_stay(seen.energy, seen.peak, scope.room // sizes[-1])
    held = [
        [
            error if _may_have(scope, option) else math.inf
            for option, error in zip(options, row, strict=True)
        ]
        if expert in forced
        else row
        for expert, row in enumerate(errors)
    ]
    stays = [math.inf if expert in forced else error for expert, error in enumerate(nothing)]
    chosen = Menu.of(sizes, held, stays, scope.gone).chosen(scope.room)
    if chosen is None:  # no room for what has to stay
        chosen = Menu.of(sizes, errors, nothing, scope.gone).chosen(scope.room)
    assert chosen is not None
    places = {width: place for place, width in enumerate(scope.widths)}
    kept = {expert: options[one] for expert, one in enumerate(chosen) if one >= 0}
    neurons = {expert: narrowed[expert].neurons[places[one.width]] for expert, one in kept.items()}
    kinds = {expert: one.kind for expert, one in kept.items()}
    slot_map = _slot_map(scope, tokens, forward, sorted(kept))
    return rebuild(scope, tokens, StandIns(slot_map, neurons, kinds), grams)


def _may_have(scope: ScopeView, option: RecordOption) -> bool:
    """Whether a record is enough for an expert that has to stay."""
    return 2 * option.width >= scope.widths[-1] and option.kind in _ENOUGH


def _slot_map(
    scope: ScopeView,
    tokens: LayerTokens,
    forward: Callable[[int, Tensor], Tensor],
    kept: Sequence[int],
) -> SlotMap:
    """Of every router slot: its own expert where that is ``kept``, else what stands in for it best."""
    count, layer = len(scope.pool), scope.layers[0].layer
    if len(kept) == count:
        return slot_map_of(layer, range(count))
    gone = sorted(set(range(count)) - set(kept))
    sample = _about(tokens, torch.tensor(gone))
    return assign(slot_errors(sample, count, forward, list(kept), gone), kept, layer)


def _about(tokens: LayerTokens, slots: Tensor) -> LayerTokens:
    """A sample of tokens: three in four chose one of ``slots``, about ``_VISITS`` a slot; the others anything."""
    visits = torch.isin(tokens.slots, slots).sum(1)
    about = visits.nonzero().squeeze(1)
    enough = _VISITS * len(slots) * len(about) // max(1, int(visits.sum()))
    wanted = min(len(about), enough, SAMPLE_TOKENS * 3 // 4)
    picked = about[torch.arange(wanted) * len(about) // max(1, wanted)]
    others = torch.arange(min(len(tokens), max(wanted, SAMPLE_TOKENS // 8) // 3))
    others = others * len(tokens) // max(1, len(others))
    return tokens.rows(torch.cat([picked, others]).unique())


def _alike(scope: ScopeView, tokens: LayerTokens, keep: int) -> Decision:
    """``keep`` prototypes of the same number of neurons."""
    layer, forward = scope.layers[0], _forward(scope)
    if keep >= len(scope.pool):
        return rebuild(scope, tokens, StandIns(slot_map_of(layer.layer, range(len(scope.pool)))))
    held = torch.zeros(len(tokens), dtype=torch.bool) if tokens.held is None else tokens.held
    seen = tokens.rows((~held).nonzero().squeeze(1))
    errors = slot_errors(seen.sample(SAMPLE_TOKENS), len(scope.pool), forward)
    choices = candidates(errors, layer.statistics.contribution(), keep, layer.layer)
    chosen = choices[0]
    if len(choices) > 1 and bool(held.any()):
        fitted, measured = seen.sample(FITTED), tokens.rows(held.nonzero().squeeze(1))
        measured = measured.sample(MEASURED)
        left = [error_on(scope, measured, rebuild(scope, fitted, one)) for one in choices]
        chosen = choices[left.index(min(left))]
    return rebuild(scope, tokens, chosen)


def _forward(scope: ScopeView) -> Callable[[int, Tensor], Tensor]:
    def forward(expert: int, hidden: Tensor) -> Tensor:
        moved = hidden.to(scope.device, scope.dtype)
        return expert_forward(scope.module, moved, whole_parts(scope, expert), scope.dtype)

    return forward


def candidates(
    errors: SlotErrors, contribution: Tensor, keep: int, layer: int = 0
) -> tuple[StandIns, ...]:
    """Who could stay, each set once: by what stands in for what, by energy, by REAP's criterion.

    Args:
        errors: of the layer.
        contribution: [E], the mean of g |f| over a slot's tokens (arXiv 2510.13999).
        keep: prototypes.
        layer: its number, for the map.
    """
    forced = must_stay(errors.seen.energy, errors.seen.peak, keep)
    sets = (
        select(errors, keep, forced),
        strongest(errors.seen.energy.sum(0), keep, forced),
        strongest(contribution, keep, forced),
    )
    return tuple(StandIns(assign(errors, one, layer)) for one in dict.fromkeys(sets))


AUTO = Method(
    "auto",
    "auto",
    "this project",
    decide,
    Needs(tokens=True, target=True),
    trims=True,
    budgets=True,
    constants=True,
)
