"""How far a run is, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil
import torch

from conmoe_edge.compress.run.job import Job, OnProgress, Progress
from conmoe_edge.compress.work.part_clock import Clock


class Meter:
    """Tells ``progress`` the stage and the layer, with the time that is left once a layer is done.

    ``clock`` goes on from the ``seconds`` of earlier runs.
    """

    def __init__(self, job: Job, progress: OnProgress, seconds: Mapping[str, float]) -> None:
        self.clock = Clock(dict(seconds))
        self.progress = progress
        self._device = job.device
        self._layers = len(job.anatomy.layers)
        held, train = job.held_out.ids.numel(), job.train.ids.numel()
        self._receipt_share = held / (
            held + train
        )  # a layer of the receipt runs the held-out tokens only
        self._done = 0
        self._began = 0.0

    def announce(self, stage: str, layer: int) -> None:
        """A layer begins."""
        left = None
        if not self._done:
            self._began = time.perf_counter()
        else:
            per_layer = (time.perf_counter() - self._began) / self._done
            later = self._receipt_share * self._layers if stage == "calibrate" else 0
            left = per_layer * (self._layers - layer + later)
        used = _in_use(self._device)
        self.progress(Progress(stage, layer, self._layers, f"layer {layer + 1}", left, used))

    def layer_done(self) -> None:
        """A layer of the current phase is done."""
        self._done += 1

    def phase_done(self) -> None:
        """Layers of the next phase take another time."""
        self._done = 0


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss
