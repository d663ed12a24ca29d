"""The whole consolidation of one model: from a checked checkpoint to the files of a package.

Order: dense tensors and side files (``prepare``); where layers get numbers of their own, a look at
what each is worth (``survey``); then layer by layer over the calibration and held-out sequences,
deciding and writing the prototypes of each scope as soon as its last layer has run (``calibrate``,
``decide``); then the written package once more over the held-out sequences (``measure``); then the
manifest (``describe``). After each layer the journal makes the state durable, so a run that was
killed goes on with the layer it was in, and ends with the same bytes.

Peak memory of the device: one decoder layer, one of its fused parameters a second time, and one
batch of activations. On the host: the hidden states of all sequences. Raises the errors of
``CheckpointError``, ``NoSpace``, ``UnsupportedModel``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.fs.disk import disk_errors
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.compress.phases.calibrate import Calibration
from conmoe_edge.compress.phases.measure_receipt import measure
from conmoe_edge.compress.phases.prepare import prepare
from conmoe_edge.compress.phases.survey import survey
from conmoe_edge.compress.phases.write_manifest import describe
from conmoe_edge.compress.run.job import Job, OnProgress
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stream.expert_hooks import register
from conmoe_edge.plan.trace import Predictions


class Consolidation:
    """One run (or the rest of one) in the folders of a ``StagedFolder``."""

    def __init__(self, job: Job, package: Path, work: Path, progress: OnProgress) -> None:
        register()
        self.state = Run(job, package, work, progress)
        self._calibration = Calibration(self.state)

    def run(self) -> Manifest:
        """Do what is left to do and return the manifest, not yet written."""
        run = self.state
        with torch.no_grad(), disk_errors(run.package), ShardReader(run.job.index) as reader:
            if run.journal.phase == "prepare":
                prepare(run, reader)
            if run.journal.phase == "calibrate":
                model = run.streamed(reader)
                if run.shares_out() and not run.journal.budgets:
                    survey(run, model)
                self._calibration.through(model)
            if run.journal.phase == "receipt":
                measure(run)
        return describe(run)

    def predictions(self) -> Predictions | None:
        """After ``run``: what the package's predictor says about tokens that it was not fitted on."""
        return self._calibration.predictions()
