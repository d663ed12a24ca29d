"""The calls of the package, one file a call, and their reports. They join the layers below; nothing is printed here.

A call is imported when it is first asked for: ``doctor`` has to run where another one's needs are missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conmoe_edge.api.benching import bench
    from conmoe_edge.api.diagnosing import doctor
    from conmoe_edge.api.evaluating import evaluate
    from conmoe_edge.api.exporting import export
    from conmoe_edge.api.fitting import FitReport, fit
    from conmoe_edge.api.fitting_loss import fit_within_loss
    from conmoe_edge.api.listing import models
    from conmoe_edge.api.planning import PlanReport, plan
    from conmoe_edge.api.publishing import pull, push
    from conmoe_edge.api.running import evaluate_tasks, load

__all__ = [
    "FitReport",
    "PlanReport",
    "bench",
    "doctor",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fit",
    "fit_within_loss",
    "load",
    "models",
    "plan",
    "pull",
    "push",
]

_PLACES = {
    "FitReport": "fitting",
    "PlanReport": "planning",
    "bench": "benching",
    "doctor": "diagnosing",
    "evaluate": "evaluating",
    "evaluate_tasks": "running",
    "export": "exporting",
    "fit": "fitting",
    "fit_within_loss": "fitting_loss",
    "load": "running",
    "models": "listing",
    "plan": "planning",
    "pull": "publishing",
    "push": "publishing",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
