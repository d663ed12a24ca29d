"""The pool of a scope: the routed experts of consecutive MoE layers that share prototypes (ConMoE, section 3.1).

Which layers form a scope is the plan's arithmetic (``plan.levers.scopes``).
"""

from __future__ import annotations

from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.model.anatomy import ModelAnatomy


def pool_of(anatomy: ModelAnatomy, scope: tuple[int, ...]) -> tuple[ExpertId, ...]:
    """The routed experts of a scope, by layer, then expert."""
    found = []
    for index in scope:
        experts = anatomy.layers[index].experts
        assert experts is not None
        found += [ExpertId(index, expert) for expert in range(experts.count)]
    return tuple(found)
