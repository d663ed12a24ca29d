"""The main phase: the original over calibration and held-out text, layer by layer, each scope decided on the way.

Peak memory: one decoder layer, one of its fused parameters a second time, one batch of activations;
on the host the hidden states of all sequences, and what the method asks to keep.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext

from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, write_constants
from conmoe_edge.compress.phases.decide import decide, row_sample
from conmoe_edge.compress.phases.propagate import aim, follow
from conmoe_edge.compress.run.state import Run
from conmoe_edge.compress.stats.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.stats.mixed_precision import save_sample
from conmoe_edge.compress.stats.output_vectors import VectorTracker
from conmoe_edge.compress.stats.statistics import StatisticsTracker
from conmoe_edge.compress.stream.expert_hooks import RoutedTap, attach
from conmoe_edge.compress.stream.layer_stream import Stream, run_layer
from conmoe_edge.compress.stream.predictor_fit import PredictorFit
from conmoe_edge.compress.stream.trace_recorder import RoutingRecorder
from conmoe_edge.model.router import logits_to
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.trace import Predictions


class Calibration:
    """The phase, and the routing trace and predictor that it leaves."""

    def __init__(self, run: Run) -> None:
        self.run = run
        job = run.job
        self._routing = RoutingRecorder({"held_out": job.held_out, "train": job.train})
        lengths = self._routing.lengths
        self._predictor = (
            PredictorFit(run.work, lengths, job.device)
            if job.predict and sum(lengths) >= 4
            else None
        )

    def through(self, model: StreamedModel) -> None:
        sets = {"train": self.run.job.train, "held_out": self.run.job.held_out}
        follows = self.run.method.needs.target
        if self.run.method.needs.logits or self.run.method.reroutes:
            model.routers()  # looked for while nothing is loaded
        if follows:
            sets["package"] = self.run.job.train
            sets["probe"] = self.run.job.train.some(1)
        streams = self.run.open_streams(model, sets, "calibrate")
        for index in range(self.run.journal.done, self.run.layers):
            self.run.announce("calibrate", index)
            with self.run.loaded(model, index):
                tokens = self._statistics(model, index, streams)
                before = left = None
                if follows and index in model.experts:
                    tokens, before = aim(self.run, model, index, streams)
                if index in model.experts:
                    left = decide(self.run, model.experts[index][1], index, tokens, model.routers)
                if follows:
                    follow(self.run, model, index, streams["package"], tokens, before, left)
            self.run.layer_done("calibrate", index, streams)
        layers = tuple(layer.index for layer in self.run.job.anatomy.moe_layers)
        routing = self._routing.write(self.run.work, self.run.package, layers)
        if routing is not None:
            self.run.note(routing)
        if self._predictor is not None:
            self.run.note(self._predictor.write(self.run.package, self.run.numbers()))
        constants = {
            layer: found for layer in layers if (found := self.run.constants_of(layer)) is not None
        }
        if constants:
            self.run.note(write_constants(self.run.package / CONSTANTS_FILE, constants))
        self.run.journal.save_hidden("original", 0, {"held_out": streams["held_out"].hidden})
        self.run.done_here = 0
        self.run.save("receipt", 0)
        self._routing.drop(self.run.work, layers)
        self.run.journal.drop_hidden("calibrate", self.run.layers)

    def _statistics(
        self, model: StreamedModel, index: int, streams: Mapping[str, Stream]
    ) -> LayerTokens | None:
        """The original's streams through a loaded layer.

        Returns the layer's tokens, where the method needs those of the original.
        """
        tap = tokens = None
        needs = self.run.method.needs
        if index in model.experts:
            module = model.experts[index][1]
            tap = RoutedTap()
            tap.routing = self._routing
            tap.keep_hidden = self._predictor is not None
            self._routing.start_layer()
            attach(module, tap)
        start = time.perf_counter()
        for name in ("train", "held_out"):
            if tap is not None:
                experts = self.run.experts(index)
                tap.tracker = StatisticsTracker(experts.count) if name == "train" else None
                self._routing.start_set(name)
                tap.sample = row_sample(self.run, experts) if name == "train" else None
                wanted = name == "train" and needs.tokens and not needs.target
                tap.tokens = TokenRecorder() if wanted else None
                hidden_size = self.run.job.anatomy.hidden_size
                gathers = name == "train" and needs.vectors
                tap.vectors = VectorTracker(experts.count, hidden_size) if gathers else None
            listening = nullcontext()
            if tap is not None and tap.tokens is not None and needs.logits:
                listening = logits_to(model.routers()[index], tap.take_logits)
            with listening:
                run_layer(model, index, streams[name], tap)
            if tap is not None and tap.tracker is not None:
                self.run.journal.statistics[str(index)] = tap.tracker.result().to_json()
            if tap is not None and tap.tokens is not None:
                tokens = tap.tokens.result()
            if tap is not None and tap.vectors is not None:
                tap.vectors.result().save(self.run.vectors_file(index))
            if tap is not None and tap.sample is not None:
                save_sample(self.run.sample_file(index), tap.sample.tensors())
        if tap is not None:
            self._routing.save_layer(self.run.work, index)
        inside = 0.0 if tap is None else tap.seconds
        self.run.clock.add("experts", inside)
        self.run.clock.add("attention", time.perf_counter() - start - inside)
        if tap is not None and self._predictor is not None:
            with self.run.clock.part("predictor"):
                before = [one.index for one in self.run.job.anatomy.moe_layers if one.index < index]
                hidden, slots = self._routing.taken()
                count = self.run.experts(index).count
                self._predictor.layer(index, max(before, default=None), hidden, slots, count)
        return tokens

    def predictions(self) -> Predictions | None:
        """After ``run``: what the package's predictor says about tokens that it was not fitted on."""
        return None if self._predictor is None else self._predictor.predictions(self.run.numbers())
