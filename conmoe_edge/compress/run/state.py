"""One consolidation: what it is told, what follows from that, where it writes, how far it is.

The parts are values or small objects of their own; ``Run`` holds them together for the phases, and knows the one thing
that concerns several: how a pass over the layers begins, and what makes the end of a layer durable.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy
from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.methods.interface import Method, Needs
from conmoe_edge.compress.run.feedback import needs_of, takes_package_stream
from conmoe_edge.compress.run.job import Job, OnProgress
from conmoe_edge.compress.run.journal import Journal
from conmoe_edge.compress.run.meter import Meter
from conmoe_edge.compress.run.record_sizes import RecordSizes
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.layer_stream import Stream, compute_dtype, open_stream
from conmoe_edge.compress.stream.streamed_model import stream_model
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.compress.work.work_folder import WorkFolder
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.scope_choice import with_scope


@dataclass(frozen=True, slots=True)
class Run:
    """One consolidation (or the rest of one) in the folders of a ``StagedFolder``.

    Attributes:
        job, method: what is to be done.
        sizes: counts and layouts that follow from it.
        package: folder of the files that are written.
        work: folder of what waits until then.
        journal: what is done; changed by the phases.
        meter: tells the progress and takes the time.
        resumed_from: layers that an earlier run had done in the phase that goes on.
        dtype: in which experts are computed, and the streams.
    """

    job: Job
    method: Method
    sizes: RecordSizes
    package: Path
    work: WorkFolder
    journal: Journal
    meter: Meter
    resumed_from: int
    dtype: torch.dtype

    @classmethod
    def open(cls, job: Job, package: Path, work: Path, progress: OnProgress) -> Run:
        """A new run, or what an earlier one left in the work folder."""
        journal, method = Journal.open(work), METHODS[job.method]
        return cls(
            job=job,
            method=method,
            sizes=RecordSizes.of(job, method),
            package=package,
            work=WorkFolder(work),
            journal=journal,
            meter=Meter(job, progress, journal.seconds),
            resumed_from=journal.done if journal.phase in ("calibrate", "receipt") else 0,
            dtype=compute_dtype(job.device, getattr(torch, job.anatomy.dtype)),
        )

    def with_scope(self, scope: int) -> Run:
        """The same run where so many layers share prototypes."""
        job = replace(self.job, decided=with_scope(self.job.decided, scope))
        return replace(self, job=job, sizes=RecordSizes.of(job, self.method))

    @property
    def clock(self) -> Clock:
        """Seconds by part, earlier runs included."""
        return self.meter.clock

    @property
    def needs(self) -> Needs:
        """What calibration has to keep."""
        return needs_of(self.method, self.sizes)

    @property
    def has_package_stream(self) -> bool:
        """Whether the calibration text also goes through the layers as they were written."""
        return takes_package_stream(self.needs, self.sizes)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.job.anatomy.layers)

    def original(self, tensors: Mapping[str, Lazy]) -> StreamedModel:
        """The model of the job, nothing loaded; ``tensors`` are ``OpenedModel.tensors``."""
        return stream_model(self.job.config, self.job.anatomy, tensors, self.job.device)

    def open_streams(
        self,
        model: StreamedModel,
        sets: Mapping[str, TokenSet],
        phase: str,
        as_package: Collection[str] = (),
    ) -> dict[str, Stream]:
        """The token sets in front of the first layer that the phase has not done.

        Those named in ``as_package`` see keys and values as the package keeps them.
        """
        with self.clock.part("read"):
            model.load_outside()
        done = self.journal.done
        hidden = self.work.load_hidden(phase, done) if done else {}
        with self.clock.part("attention"):
            kv = {name: self.job.decided.kv_precision for name in as_package}
            streams = {
                name: open_stream(model, tokens, hidden.get(name), kv.get(name, "source"))
                for name, tokens in sets.items()
            }
        model.drop_outside()
        return streams

    def layer_done(self, phase: str, index: int, streams: Mapping[str, Stream]) -> None:
        """Make the end of a layer durable, and delete what it made superfluous."""
        with self.clock.part("journal"):
            hidden = {name: stream.hidden for name, stream in streams.items()}
            self.work.save_hidden(phase, index + 1, hidden)
            self.save(phase, index + 1)
            self.work.drop_hidden(phase, index)
            for scope in self.sizes.scopes:
                if scope[-1] == index:
                    self.work.drop_scope(scope)
        self.meter.layer_done()

    def save(self, phase: str, done: int = 0) -> None:
        """Make the journal durable: ``done`` layers of ``phase`` are finished."""
        self.journal.phase, self.journal.done = phase, done
        self.journal.seconds = dict(self.clock.seconds)
        self.journal.save()
