"""The calls of the package: ``plan``, ``fit``, ``load``, ``evaluate``, ``evaluate_tasks``, ``export``.

They join the layers below, one file a call. Nothing is printed here.
"""

from conmoe_edge.api.evaluating import evaluate
from conmoe_edge.api.exporting import export
from conmoe_edge.api.fitting import FitReport, fit
from conmoe_edge.api.planning import PlanReport, plan
from conmoe_edge.api.running import evaluate_tasks, load

__all__ = [
    "FitReport",
    "PlanReport",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fit",
    "load",
    "plan",
]
