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
3. Where there are several candidates, each is fitted on three quarters of the calibration sequences
   and measured on the others; the one with the least error is fitted again on all.

Weights of prototypes change, other than with ConMoE. Parts of this are known: facility location and
replaceability from ConMoE (arXiv 2605.29350), constants from MoNE (2507.00390), least squares for the
down projection from MergeMoE (2510.14436), working on the compressed stream from REAM (2604.04356),
neurons as the unit from CAMERA-P and MoE-Slimming (2606.18304), neurons that move to another expert
from DERN, the cost of a neuron from the optimal brain surgeon. docs/auto.md says what it is worth.

Peak memory: that of ``rebuild`` beside the layer's tokens.
"""

from __future__ import annotations

from torch import Tensor

from conmoe_edge.compress.closed_form import SAMPLE_TOKENS, slot_errors
from conmoe_edge.compress.facility import assign, must_stay, select
from conmoe_edge.compress.methods.interface import Decision, Method, Needs, ScopeView, identity
from conmoe_edge.compress.rebuild import StandIns, rebuild, whole_parts
from conmoe_edge.model.experts import expert_forward


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

    errors = slot_errors(tokens.sample(SAMPLE_TOKENS), len(scope.pool), forward)
    prototypes = select(errors, keep, must_stay(errors, keep))
    return rebuild(scope, tokens, StandIns(prototypes, tuple(assign(errors, prototypes))))


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
