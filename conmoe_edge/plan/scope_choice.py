"""How many layers share prototypes, where nobody said: a fit measures it where that can be compared. Arithmetic only.

Methods that keep experts as they are can share a pool between layers, and mostly gain from it (docs/methods.md). By how
much depends on the model and on the rate, so ``compress/phases/pool_trial.py`` tries the scopes that are named here on
calibration text, and ``nearest`` chooses. A plan is made with scopes of one layer; only those scopes are tried in
which as many prototypes stay, so that every byte that was planned holds for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.levers import kept, scopes
from conmoe_edge.plan.plan import Candidate, Plan
from conmoe_edge.plan.request import PlanRequest

_POOLED = 2
"""Layers that share a pool beside the plan's one. More of them have brought little more (docs/methods.md)."""


def scopes_to_try(
    anatomy: ModelAnatomy, request: PlanRequest, chosen: Candidate, *, keeps: bool
) -> tuple[int, ...]:
    """The scopes that a fit measures, ascending; empty where the plan's own is taken.

    Args:
        anatomy: of the model.
        request: what was asked.
        chosen: of the plan.
        keeps: whether the method keeps experts as they are (``Method.keeps``).
    """
    asked = request.scope != "auto" or request.engine is not None
    if asked or not keeps or chosen.rate == 0.0:
        return ()
    pools = scopes(anatomy, _POOLED)
    if all(len(pool) == 1 for pool in pools):
        return ()
    count = {one.index: one.experts.count for one in anatomy.moe_layers if one.experts is not None}
    for pool in pools:
        apart = sum(kept(count[layer], chosen.rate) for layer in pool)
        if kept(sum(count[layer] for layer in pool), chosen.rate) != apart:
            return ()
    return (chosen.scope, _POOLED)


def trial_bytes(anatomy: ModelAnatomy, tried: Sequence[int]) -> int:
    """Of disk, while scopes are tried: the experts of the layers of the largest."""
    largest = max((one.count * one.expert_bytes for one in anatomy.moe_experts), default=0)
    return max(tried, default=0) * largest


def nearest(measured: Mapping[int, float]) -> int:
    """The scope with the least divergence from the original; the smallest where they tie."""
    return min(measured, key=lambda scope: (measured[scope], scope))


def with_scope(plan: Plan, scope: int) -> Plan:
    """The plan with another scope, one of ``scopes_to_try``."""
    chosen = replace(plan.chosen, scope=scope)
    others = tuple(chosen if one == plan.chosen else one for one in plan.candidates)
    return replace(plan, chosen=chosen, candidates=others)


def scope_note(measured: Mapping[int, float], taken: int) -> str:
    """What a package says of the choice."""
    found = ", ".join(
        f"{value:.4f} with pools of {scope} {'layer' if scope == 1 else 'layers'}"
        for scope, value in sorted(measured.items())
    )
    others = [scope for scope in sorted(measured) if scope != taken]
    force = "".join(f" --scope {scope} takes the other." for scope in others)
    return (
        f"Scope {taken} was measured to be best: on calibration text that nothing was chosen on the output diverges "
        f"by {found} (KL, nats a token).{force}"
    )


UNMEASURED = (
    "How many layers should share prototypes was not measured, because the model was read once; --passes 2 measures "
    "it, --scope 2 takes two."
)
