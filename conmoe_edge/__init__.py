"""Fit a Mixture-of-Experts language model into the memory you have, and run it.

- ``plan(...)``: what would be done for a model and a budget;
- ``fit(...)``: do it and write a package;
- ``load(path, budget=None, device=None)``: a transformers model that runs inside the budget;
- ``evaluate(...)``: how good a package is on text, beside the model that it was made from;
- ``evaluate_tasks(...)``: the same by tasks of lm-eval;
- ``bench(...)``: how fast a package runs here, and which bound this machine has;
- ``models(...)``: the names that a model can have, what is on this disk, what would fit;
- ``doctor(...)``: what this machine has and what is wrong with it.

After ``import conmoe_edge`` a package also opens through transformers' own door,
``AutoModelForCausalLM.from_pretrained("./out")``. Importing this package imports neither torch nor
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# The import system binds a sub-package to its parent when it is first imported. It is imported here and the name taken
# away again, so that ``conmoe_edge.plan`` is the function for good; ``conmoe_edge.plan.planner`` is imported as ever.
from conmoe_edge import plan
from conmoe_edge.errors import (
    CalibrationError,
    CheckpointError,
    ConmoeError,
    ContextFull,
    DoesNotFit,
    InUse,
    ModelNotFound,
    NoSpace,
    OutOfMemory,
    OutputExists,
    PackageError,
    ResumeMismatch,
    UnsupportedModel,
    UsageError,
)
from conmoe_edge.integrations.register import watch_transformers
from conmoe_edge.waiting_threads import bound_spinning

del plan

if TYPE_CHECKING:
    from conmoe_edge.api import bench, doctor, evaluate, evaluate_tasks, fit, load, models, plan

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConmoeError",
    "ContextFull",
    "DoesNotFit",
    "InUse",
    "ModelNotFound",
    "NoSpace",
    "OutOfMemory",
    "OutputExists",
    "PackageError",
    "ResumeMismatch",
    "UnsupportedModel",
    "UsageError",
    "__version__",
    "bench",
    "doctor",
    "evaluate",
    "evaluate_tasks",
    "fit",
    "load",
    "models",
    "plan",
]

_CALLS = ("bench", "doctor", "evaluate", "evaluate_tasks", "fit", "load", "models", "plan")

bound_spinning()
watch_transformers()


def __getattr__(name: str) -> Any:
    # PEP 562: most of these pull in torch, so they are fetched when they are first asked for.
    if name in _CALLS:
        from conmoe_edge import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
