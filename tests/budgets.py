"""Budgets in which a tiny model's prototypes do not all have a slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conmoe_edge import api
from conmoe_edge.errors import DoesNotFit
from conmoe_edge.memory.budget import Budget
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest


def least_budget(source: Path, slots: int, **levers: Any) -> str:
    """What to give as ``budget`` so that the plan of the model in ``source`` has so many slots and few more."""
    anatomy = api.plan(str(source), budget="4GB", device="cpu").anatomy

    def planned(nbytes: int) -> int:
        try:
            plan = make_plan(anatomy, Budget("cpu", nbytes, "", "test"), PlanRequest(**levers))
        except DoesNotFit:
            return 0
        return plan.chosen.slots

    low, high = 0, 4 * 10**9
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if planned(middle) >= slots else (middle + 1, high)
    return f"{low}B"
