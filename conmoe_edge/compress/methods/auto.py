"""``auto``: prototypes that stand in for others by measured error, rebuilt and refitted layer after layer.

The layers are taken one after another on the stream of the model as it has become so far, and every
layer aims at what the *original* residual stream was behind it, so that it also makes up for what
the layers before it lost:

1. Every expert runs on a sample of tokens; ``closed_form`` says at which error each could stand in for
   each slot. ``facility`` keeps those with which the sum of errors is least, super experts and the
   first of every domain among them; every other slot becomes prototype x scale + constant, or a
   constant alone. The router stays.
2. Part of the reduction is neurons instead of experts (``plan/trim.py``): ``rebuild`` fills every
   prototype with the best neurons of all experts that it stands for, and solves the down
   projections of all prototypes and the constants of all slots together.
3. Which experts stay is decided by measurement: facility location, the energy of outputs and REAP's
   criterion each say who; what they come to is fitted on some of the calibration sequences and
   measured on others, and the one with the least error (ties to the first) is fitted on all.

Weights of prototypes change, other than with ConMoE. Parts of this are known: facility location and
replaceability from ConMoE (arXiv 2605.29350), constants from MoNE (2507.00390), least squares for the
down projection from MergeMoE (2510.14436), working on the compressed stream from REAM (2604.04356),
neurons as the unit from CAMERA-P and MoE-Slimming (2606.18304), neurons that move to another expert
from DERN, the cost of a neuron from the optimal brain surgeon. docs/auto.md says what it is worth.

Peak memory: that of ``rebuild`` beside the layer's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.compress.closed_form import SAMPLE_TOKENS, SlotErrors, slot_errors
from conmoe_edge.compress.facility import assign, must_stay, select, strongest
from conmoe_edge.compress.methods.interface import Decision, Method, Needs, ScopeView, identity
from conmoe_edge.compress.rebuild import StandIns, error_on, rebuild, whole_parts
from conmoe_edge.model.experts import expert_forward

FITTED, MEASURED = 8192, 4096
"""Tokens that candidates are fitted on and measured on."""


def decide(scope: ScopeView, keep: int) -> Decision:
    """Prototypes, slots, constants and new weights of one layer; ``keep`` prototypes of ``scope.width`` neurons."""
    (layer,) = scope.layers
    tokens = layer.tokens
    assert tokens is not None and tokens.target is not None, (
        "auto needs the tokens and their target"
    )
    if keep >= len(scope.pool) and scope.width >= _width(scope):
        return identity(scope)
    tokens = tokens.weighted()

    def forward(expert: int, hidden: Tensor) -> Tensor:
        moved = hidden.to(scope.device, scope.dtype)
        return expert_forward(scope.module, moved, whole_parts(scope, expert), scope.dtype)

    held = torch.zeros(len(tokens), dtype=torch.bool) if tokens.held is None else tokens.held
    seen = tokens.rows((~held).nonzero().squeeze(1))
    errors = slot_errors(seen.sample(SAMPLE_TOKENS), len(scope.pool), forward)
    choices = candidates(errors, layer.statistics.contribution(), keep)
    chosen = choices[0]
    if len(choices) > 1 and bool(held.any()):
        fitted, measured = seen.sample(FITTED), tokens.rows(held.nonzero().squeeze(1))
        measured = measured.sample(MEASURED)
        left = [error_on(scope, measured, rebuild(scope, fitted, one)) for one in choices]
        chosen = choices[left.index(min(left))]
    return rebuild(scope, tokens, chosen)


def candidates(errors: SlotErrors, contribution: Tensor, keep: int) -> tuple[StandIns, ...]:
    """Who could stay, each set once: by what stands in for what, by energy, by REAP's criterion.

    Args:
        errors: of the layer.
        contribution: [E], the mean of g |f| over a slot's tokens (arXiv 2510.13999).
        keep: prototypes.
    """
    forced = must_stay(errors, keep)
    sets = (
        select(errors, keep, forced),
        strongest(errors.energy.sum(0), keep, forced),
        strongest(contribution, keep, forced),
    )
    return tuple(StandIns(one, tuple(assign(errors, one))) for one in dict.fromkeys(sets))


def _width(scope: ScopeView) -> int:
    return scope.weights.parts(scope.pool[0])["down_proj"].shape[
        0 if scope.module.is_transposed else 1
    ]


AUTO = Method(
    "auto",
    "auto",
    "this project",
    decide,
    Needs(tokens=True, target=True),
    trims=True,
    budgets=True,
)
