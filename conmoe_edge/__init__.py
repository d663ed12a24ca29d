"""Fit a Mixture-of-Experts language model into the memory you have, and run it.

- ``plan(...)``: what would be done for a model and a budget;
- ``fit(...)``: do it and write a package;
- ``load(path, budget=None, device=None)``: a transformers model that runs inside the budget;
- ``evaluate(...)``: how good a package is on text, beside the model that it was made from;
- ``evaluate_tasks(...)``: the same by tasks of lm-eval.

After ``import conmoe_edge`` a package also opens through transformers' own door,
``AutoModelForCausalLM.from_pretrained("./out")``. Importing this package imports neither torch nor
transformers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from conmoe_edge.api import evaluate, evaluate_tasks, fit, load, plan

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
    "evaluate",
    "evaluate_tasks",
    "fit",
    "load",
    "plan",
]

watch_transformers()


class _Package(ModuleType):
    """This module, with ``plan`` being the function although a sub-package has the same name.

    The import system binds a sub-package to its parent's attribute; here that assignment is
    dropped, and ``from conmoe_edge.plan.planner import make_plan`` works all the same, since
    imports go by the full name.
    """

    @property
    def plan(self) -> Any:
        from conmoe_edge import api

        return api.plan

    @plan.setter
    def plan(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # PEP 562: these pull in torch, so they are fetched when they are first asked for.
    if name in ("evaluate", "evaluate_tasks", "fit", "load"):
        from conmoe_edge import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
