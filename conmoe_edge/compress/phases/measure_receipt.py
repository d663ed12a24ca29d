"""The last phase: the written package, layer by layer over the held-out text, beside the original.

Peak memory: one decoder layer without its experts, the prototypes of that layer, one batch of activations, then the
logits of one sequence twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy
from conmoe_edge.compress.quality.receipt import compare_heads
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stream.layer_stream import Stream
from conmoe_edge.compress.stream.streamed_model import package_subject
from conmoe_edge.model.streaming import StreamedModel


def measure(run: Run, manifest: Manifest, tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    """The receipt of the package that ``manifest`` describes. ``tensors``: of the original."""
    job, clock = run.job, run.clock
    index = CheckpointIndex.open(run.package)
    with package_subject(
        index, manifest, job.config, job.anatomy, job.device, "the package"
    ) as subject:
        held_out = {"held_out": job.held_out}
        streams = run.open_streams(subject.model, held_out, "receipt", as_package=held_out)
        for layer in range(run.journal.done, run.layers):
            run.meter.announce("receipt", layer)
            with subject.layer(layer, clock):
                start = time.perf_counter()
                subject.advance(layer, streams["held_out"])
                clock.add("receipt", time.perf_counter() - start)
            run.layer_done("receipt", layer, streams)
        with clock.part("read"):
            subject.model.load_outside()
        with clock.part("receipt"):
            return _compare(run, subject.model, streams["held_out"], tensors)


def _compare(
    run: Run, package: StreamedModel, after: Stream, tensors: Mapping[str, Lazy]
) -> dict[str, Any]:
    """The hidden states of both through norm and head: the original's, and the package's.

    Where nothing dense is quantised these are the same bytes, and are loaded once.
    """
    hidden = run.work.load_hidden("original", 0)["held_out"]
    original = package
    if run.job.dense_precision != "source":
        original = run.original(tensors)
        original.load_outside()
    job = run.job
    return compare_heads(original, hidden, package, after.hidden, job.held_out, job.match_places)
