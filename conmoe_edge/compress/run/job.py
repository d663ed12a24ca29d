"""What a consolidation is told, and what it tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.match_places import MatchPlaces
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.opened import OpenedModel
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serialise import plan_to_json


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done; everything that decides the bytes of the package.

    Attributes:
        model: what is consolidated.
        request: what was asked, with ``method`` the name of a method.
        decided: the plan.
        train, held_out: tokens to calibrate on and to measure on.
        device: where to compute.
        tool_version: of this program.
        match_places: of ``held_out``, where the receipt is to have exact matches.
        passes: 1 reads every weight once, 2 measures before that what each layer is worth.
    """

    model: OpenedModel
    request: PlanRequest
    decided: Plan
    train: TokenSet
    held_out: TokenSet
    device: torch.device
    tool_version: str
    passes: int = 2
    match_places: MatchPlaces | None = None

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.model.config

    @property
    def anatomy(self) -> ModelAnatomy:
        """The model in numbers."""
        return self.model.anatomy

    @property
    def source(self) -> dict[str, Any]:
        """Which model that is, as the manifest says it."""
        return self.model.to_json()

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as the manifest says it."""
        return plan_to_json(self.decided)

    @property
    def method(self) -> str:
        """Name of the consolidation method."""
        assert self.request.method is not None, "a job's request names its method"
        return self.request.method

    @property
    def rate(self) -> float:
        """Share of the routed experts that goes."""
        return self.decided.chosen.rate

    @property
    def scope(self) -> int:
        """Neighbouring MoE layers that share prototypes."""
        return self.decided.chosen.scope

    @property
    def precision(self) -> str:
        """Number format of the prototypes."""
        return self.decided.chosen.precision

    @property
    def wide_prototypes(self) -> int:
        """Prototypes that get the wider kind of a mixed precision."""
        return self.decided.chosen.wide_prototypes

    @property
    def dense_precision(self) -> str:
        """Number format of the matrices outside the routed experts."""
        return self.decided.dense_precision

    @property
    def width(self) -> int:
        """Neurons of every prototype where all experts are kept; 0 where the rate says how many are."""
        return self.decided.chosen.width

    @property
    def equal(self) -> bool:
        """Whether all prototypes of a method that trims get the same number of neurons."""
        return self.request.equal

    @property
    def predict(self) -> bool:
        """Whether a predictor of the next layer's prototypes is fitted: not all of them will be resident."""
        return self.decided.chosen.slots < self.decided.chosen.prototypes


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a fit is. ``stage`` is ``locate``, ``write``, ``survey``, ``trial``, ``scope``, ``calibrate``, ``receipt``
    or ``verify``; ``step`` of ``steps`` are done in it; ``seconds_left`` is for the whole fit, once it can be told."""

    stage: str
    step: int
    steps: int
    detail: str = ""
    seconds_left: float | None = None
    device_bytes: int | None = None


OnProgress = Callable[[Progress], None]
