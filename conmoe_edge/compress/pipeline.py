"""The whole consolidation of one model: from a checked checkpoint to the files of a package.

    prepare     dense weights and side files                            -> files
                (dense matrices in fewer bits: as calibrate comes to their layer, ``dense``)
    survey      what each layer is worth, where layers get numbers of their own  -> prototypes of every layer
    pool trial  whether layers should share prototypes, where nobody said            -> scopes
    calibrate   layer by layer over the calibration text; a scope is decided and written as soon as its
                last layer has run (``decide``)                         -> prototypes, router slots, routing trace
    measure     the written package over the held-out text              -> receipt
    describe    all of this                                             -> manifest

After each layer the journal makes the state durable, so a run that was killed goes on with the layer it was in, and
ends with the same bytes.

Peak memory of the device: one decoder layer, one of its fused parameters a second time, and one batch of activations.
On the host: the hidden states of all sequences. Raises the errors of ``CheckpointError``, ``NoSpace``,
``UnsupportedModel``.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.fs.disk import disk_errors
from conmoe_edge.compress.phases.calibrate import Trace, calibrate
from conmoe_edge.compress.phases.dense import DenseForms
from conmoe_edge.compress.phases.measure_receipt import measure
from conmoe_edge.compress.phases.pool_trial import pool_trial
from conmoe_edge.compress.phases.prepare import prepare
from conmoe_edge.compress.phases.survey import survey
from conmoe_edge.compress.phases.write_manifest import describe
from conmoe_edge.compress.run.job import Job, OnProgress, Progress
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stream.expert_hooks import register
from conmoe_edge.compress.stream.written_first import written_first
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.scope_choice import UNMEASURED, nearest, scope_note, scopes_to_try
from conmoe_edge.plan.trace import Predictions

ONE_PASS = (
    "Every layer got the same share of the bytes, because the model was read once; --passes 2 measures first what each "
    "layer is worth."
)


class Consolidation:
    """One run (or the rest of one) in the folders of a ``StagedFolder``."""

    def __init__(self, job: Job, package: Path, work: Path, progress: OnProgress) -> None:
        register()
        self.state = Run.open(job, package, work, progress)
        if self.state.journal.scope:
            self.state = self.state.with_scope(self.state.journal.scope)
        self._trace = Trace.of(job, work)

    def run(self) -> Manifest:
        """Do what is left to do and return the manifest, not yet written."""
        run, job, journal = self.state, self.state.job, self.state.journal
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(disk_errors(run.package))
            scratch = stack.enter_context(job.model.scratch(run.work.path / "source"))
            tensors = stack.enter_context(job.model.tensors(scratch))
            if journal.phase in ("prepare", "calibrate"):
                model = run.original(tensors)
                if journal.phase == "prepare":
                    if scratch is not None:
                        scratch.dense_first(keep=job.dense_precision != "source")
                    run.meter.progress(Progress("write", 0, run.layers, "dense weights"))
                    forms = DenseForms.of(model, job.dense_precision)
                    beside = job.model.beside.tensors if job.model.keeps_vision else ()
                    with run.clock.part("write"):
                        journal.add_files(
                            prepare(model, tensors, job.model.folder, run.package, forms, beside)
                        )
                        if scratch is not None:  # they are read again and again, and come once
                            for name in sorted(forms.later):
                                _ = tensors[name][...]
                    if scratch is not None:
                        scratch.layer_by_layer()
                    if note := job.model.beside.note(kept=job.model.keeps_vision):
                        journal.notes.append(note)
                    run.save("calibrate")
                if scratch is not None:
                    scratch.layer_by_layer()
                    tensors = stack.enter_context(written_first(tensors, run.package))
                    model = run.original(tensors)
                if not journal.scope:
                    run = self._with_measured_scope(run, model)
                    job = run.job
                if run.sizes.shares_out and not journal.budgets:
                    if job.passes == 1:
                        journal.notes.append(ONE_PASS)
                        journal.budgets = run.sizes.same_for_all()
                    else:
                        shares = survey(run, model)
                        journal.budgets = {str(layer): count for layer, count in shares.items()}
                    run.save("calibrate")
                journal.add_files(calibrate(run, model, self._trace))
                run.save("receipt")
                run.meter.phase_done()
                self._trace.drop(run.sizes.moe_layers)
                run.work.drop_hidden("calibrate", run.layers)
                if scratch is not None:
                    scratch.drop_layers()
            manifest = describe(job, run.sizes, journal)
            if journal.phase == "receipt":
                journal.receipt = measure(run, manifest, tensors)
                run.save("done")
                run.work.drop_hidden("receipt", run.layers)
        return replace(manifest, receipt=journal.receipt)

    def _with_measured_scope(self, run: Run, model: StreamedModel) -> Run:
        """The run with the scope that does best; the same where nothing is to be measured."""
        job, journal = run.job, run.journal
        tried = scopes_to_try(job.anatomy, job.request, job.decided.chosen, keeps=run.method.keeps)
        if not tried or journal.done:
            return run
        if job.passes == 1:
            journal.notes.append(UNMEASURED)
            journal.scope = job.scope
        else:
            measured = pool_trial(run, model, tried)
            journal.scope = nearest(measured)
            journal.notes.append(scope_note(measured, journal.scope))
            run = self.state = run.with_scope(journal.scope)
        run.save("calibrate")
        return run

    def predictions(self) -> Predictions | None:
        """After ``run``: what the package's predictor says about tokens that it was not fitted on."""
        if self._trace.predictor is None:
            return None
        return self._trace.predictor.predictions(
            self.state.journal.slot_maps(self.state.sizes.moe_layers)
        )
