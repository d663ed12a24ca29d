"""The main phase: the original over calibration and held-out text, layer by layer, each scope decided on the way.

Peak memory: one decoder layer, one of its fused parameters a second time, one batch of activations; on the host the
hidden states of all sequences, and what the method asks to keep.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.checkpoint.package.slot_constants import (
    CONSTANTS_FILE,
    read_rows,
    write_constants,
)
from conmoe_edge.compress.phases.decide import Entering, decide
from conmoe_edge.compress.phases.dense import DenseForms
from conmoe_edge.compress.phases.propagate import aim, enter, propagate
from conmoe_edge.compress.run.job import Job
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stats.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.stats.mixed_precision import RowSample, save_sample
from conmoe_edge.compress.stats.statistics import StatisticsTracker, VectorTracker
from conmoe_edge.compress.stream.expert_hooks import RoutedTap, attach
from conmoe_edge.compress.stream.layer_stream import Stream, run_layer
from conmoe_edge.compress.stream.predictor_fit import PredictorFit
from conmoe_edge.compress.stream.streamed_model import timed_layer
from conmoe_edge.compress.stream.trace_recorder import RoutingRecorder
from conmoe_edge.model.router import logits_to
from conmoe_edge.model.streaming import StreamedModel


@dataclass(frozen=True, slots=True)
class Trace:
    """The routing trace, and the predictor that is fitted on it, where the package has one."""

    work: Path
    routing: RoutingRecorder
    predictor: PredictorFit | None

    @classmethod
    def of(cls, job: Job, work: Path) -> Trace:
        """For a job; what earlier runs have taken is in the work folder."""
        routing = RoutingRecorder({"held_out": job.held_out, "train": job.train})
        lengths = routing.lengths
        fits = job.predict and sum(lengths) >= 4
        return cls(work, routing, PredictorFit(work, lengths, job.device) if fits else None)

    def drop(self, layers: Sequence[int]) -> None:
        """Delete what is in the package now."""
        self.routing.drop(self.work, tuple(layers))


def calibrate(run: Run, model: StreamedModel, trace: Trace) -> list[WrittenFile]:
    """Take every layer and decide every scope; what is decided goes into the journal.

    Returns:
        The files that need all layers: trace, predictor, constants, the index of dense weights.
    """
    job, needs = run.job, run.needs
    sets = {"train": job.train, "held_out": job.held_out}
    if needs.logits or run.method.reroutes:
        model.routers()  # looked for while nothing is loaded
    if run.has_package_stream:
        sets |= {"package": job.train, "probe": job.train.some(1)}
    forms = DenseForms.of(model, job.dense_precision)
    streams = run.open_streams(model, sets, "calibrate", as_package=("package", "probe"))
    own = streams.get("package", streams["train"])  # the package's own where there is one
    for index in range(run.journal.done, run.layers):
        run.meter.announce("calibrate", index)
        with timed_layer(model, index, run.clock, with_experts=True):
            moments = forms.layer_moments(run, model, index, own)
            seen = _observe(run, model, index, streams, trace)
            forms.round_layer(run, model, index, moments)
            entering = entered = left = None
            if index in model.experts:
                entering = _entering(run, model, index, streams)
                if needs.target and entering is not None:
                    seen = entering(None).tokens
                module = model.experts[index][1]
                entered, left = decide(run, module, index, seen, model.routers, entering)
            if run.has_package_stream:
                propagate(run, model, index, streams["package"], entered, left)
        seen = entering = entered = left = None  # the next layer needs the room
        run.layer_done("calibrate", index, streams)
    forms.round_head(run, model, own)
    run.work.save_hidden("original", 0, {"held_out": streams["held_out"].hidden})
    return [*_whole_files(run, trace), *forms.index(run)]


def _entering(
    run: Run, model: StreamedModel, index: int, streams: Mapping[str, Stream]
) -> Entering | None:
    """What brings the package's stream in front of a layer's experts; ``None`` where there is no such stream."""
    if not run.has_package_stream:
        return None
    if run.needs.target:
        found = aim(run, model, index, streams)
        return lambda _: found  # methods that aim leave routers alone
    return partial(enter, run, model, index, streams)


def _whole_files(run: Run, trace: Trace) -> list[WrittenFile]:
    layers = run.sizes.moe_layers
    written = [trace.routing.write(run.work.path, run.package, tuple(layers))]
    if trace.predictor is not None:
        written.append(trace.predictor.write(run.package, run.journal.slot_maps(layers)))
    files = {one: file for one in layers if (file := run.work.constants(one)).is_file()}
    constants = {layer: read_rows(file, layer) for layer, file in files.items()}
    if constants:
        written.append(write_constants(run.package / CONSTANTS_FILE, constants))
    return [file for file in written if file is not None]


def _observe(
    run: Run, model: StreamedModel, index: int, streams: Mapping[str, Stream], trace: Trace
) -> LayerTokens | None:
    """The original's streams through a loaded layer; what is seen of its experts goes to journal and work folder.

    Returns the layer's tokens, where the method or rounding needs those of the original.
    """
    start, tap = time.perf_counter(), RoutedTap()
    if index not in model.experts:
        for name in ("train", "held_out"):
            run_layer(model, index, streams[name], None)
        run.clock.add("attention", time.perf_counter() - start)
        return None
    attach(model.experts[index][1], tap)
    tap.routing, tap.keep_hidden = trace.routing, trace.predictor is not None
    trace.routing.start_layer()
    trace.routing.start_set("train")
    tokens = _train(run, model, index, streams["train"], tap)
    tap.tracker = tap.sample = tap.tokens = tap.vectors = None
    trace.routing.start_set("held_out")
    run_layer(model, index, streams["held_out"], tap)
    trace.routing.save_layer(run.work.path, index)
    run.clock.add("experts", tap.seconds)
    run.clock.add("attention", time.perf_counter() - start - tap.seconds)
    if trace.predictor is not None:
        with run.clock.part("predictor"):
            before = max((one for one in run.sizes.moe_layers if one < index), default=None)
            hidden, slots = trace.routing.taken()
            count = run.sizes.experts(index).count
            trace.predictor.layer(index, before, hidden, slots, count)
    return tokens


def _train(
    run: Run, model: StreamedModel, index: int, stream: Stream, tap: RoutedTap
) -> LayerTokens | None:
    """The calibration set through a loaded layer with everything gathered that the method needs."""
    needs, experts = run.needs, run.sizes.experts(index)
    count = experts.count
    listening = nullcontext()
    tracker = tap.tracker = StatisticsTracker(count)
    if not (run.sizes.alike or run.sizes.free):
        tap.sample = RowSample(count, experts.outputs)
    if needs.vectors:
        tap.vectors = VectorTracker(count, experts.outputs)
    if (needs.tokens and not needs.target) or (needs.inputs and not run.has_package_stream):
        tap.tokens = TokenRecorder()
        if needs.logits:
            listening = logits_to(model.routers()[index], tap.take_logits)
    with listening:
        run_layer(model, index, stream, tap)
    run.journal.statistics[str(index)] = tracker.result().to_json()
    if tap.vectors is not None:
        tap.vectors.result().save(run.work.vectors(index))
    if tap.sample is not None:
        save_sample(run.work.sample(index), tap.sample.tensors())
    return None if tap.tokens is None else tap.tokens.result()
