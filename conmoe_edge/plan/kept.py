"""Which of two plans for one budget keeps more of the model. Arithmetic only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conmoe_edge.plan.plan import Plan


def kept_by(plan: Plan) -> tuple[float, ...]:
    """What a plan keeps; of two the greater is the milder."""
    chosen = plan.chosen
    kept = float(plan.unchanged), -chosen.rate, chosen.pool_bytes, chosen.wide_prototypes
    return (*kept, chosen.resident_share)
