"""What a consolidation is told, and what it tells while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.model.anatomy import ModelAnatomy


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done; everything that decides the bytes of the package.

    ``plan`` and ``source`` are plain JSON and go into the manifest as they are. ``predict``: fit a predictor of the
    next layer's prototypes, for packages that will not be all resident. ``equal``: prototypes of a method that trims
    all get the same number of neurons.
    """

    index: CheckpointIndex
    config: PretrainedConfig
    anatomy: ModelAnatomy
    method: str
    rate: float
    scope: int
    precision: str
    wide_prototypes: int
    dense_precision: str
    train: TokenSet
    held_out: TokenSet
    device: torch.device
    plan: Mapping[str, Any]
    source: Mapping[str, Any]
    tool_version: str
    predict: bool = False
    equal: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a fit is. ``stage`` is ``locate``, ``write``, ``survey``, ``trial``, ``calibrate``, ``receipt`` or
    ``verify``; ``step`` of ``steps`` are done in it; ``seconds_left`` is for the whole fit, once it can be told."""

    stage: str
    step: int
    steps: int
    detail: str = ""
    seconds_left: float | None = None
    device_bytes: int | None = None


OnProgress = Callable[[Progress], None]
