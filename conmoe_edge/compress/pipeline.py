"""The whole consolidation of one model: from a checked checkpoint to the files of a package.

Order: dense tensors and side files; then layer by layer over the calibration and held-out
sequences, deciding and writing the prototypes of each scope as soon as its last layer has run; then
the written package once more over the held-out sequences, for the receipt; then the manifest. After
each layer the journal makes the state durable, so a run that was killed goes on with the layer it
was in, and ends with the same bytes.

Peak memory of the device: one decoder layer, one of its fused parameters a second time, and one
batch of activations. On the host: the hidden states of all sequences. Raises the errors of
``CheckpointError``, ``NoSpace``, ``UnsupportedModel``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig

from conmoe_edge.checkpoint.constants import CONSTANTS_FILE, read_constants, write_constants
from conmoe_edge.checkpoint.disk import disk_errors
from conmoe_edge.checkpoint.files import WrittenFile, write_json
from conmoe_edge.checkpoint.index import CheckpointIndex, index_files, read_json_object
from conmoe_edge.checkpoint.manifest import (
    FORMAT_VERSION,
    ExpertId,
    Manifest,
    PrototypeEntry,
    RecordLayout,
    SlotRecord,
)
from conmoe_edge.checkpoint.reader import ShardReader
from conmoe_edge.checkpoint.records import make_layout, view
from conmoe_edge.checkpoint.sidefiles import copy_side_files
from conmoe_edge.checkpoint.writer import write_dense
from conmoe_edge.compress.budgets import LayerWorth, share_out
from conmoe_edge.compress.calibration import TokenSet
from conmoe_edge.compress.clock import Clock
from conmoe_edge.compress.closed_form import SAMPLE_TOKENS, slot_errors
from conmoe_edge.compress.dense import Dequantised, dense_sources
from conmoe_edge.compress.distance import distances
from conmoe_edge.compress.facility import assign, curve, select
from conmoe_edge.compress.importance import RowSample, gains, load_sample, save_sample, widest
from conmoe_edge.compress.journal import Journal
from conmoe_edge.compress.layer_tokens import LayerTokens, TokenRecorder
from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.methods.interface import Decision, LayerView, ScopeView
from conmoe_edge.compress.overview import overview_of, slot_distances
from conmoe_edge.compress.predictor import PredictorFit
from conmoe_edge.compress.receipt import ReceiptTracker
from conmoe_edge.compress.scope import pool_of
from conmoe_edge.compress.statistics import LayerStatistics, StatisticsTracker
from conmoe_edge.compress.stream import (
    Stream,
    compute_dtype,
    open_stream,
    run_layer,
    sequence_logits,
)
from conmoe_edge.compress.taps import (
    IMPLEMENTATION,
    MappedTap,
    RoutedTap,
    SilentTap,
    attach,
    expert_sum,
    register,
)
from conmoe_edge.compress.trace import RoutingRecorder
from conmoe_edge.compress.weights import (
    LayerWeights,
    LoadedLayer,
    ScopeWeights,
    ScratchLayer,
    matrix_views,
    record_name,
    write_experts,
)
from conmoe_edge.memory.heap import trim_heap
from conmoe_edge.model.anatomy import ExpertsAnatomy, ModelAnatomy
from conmoe_edge.model.bridge import targets_of
from conmoe_edge.model.experts import expert_forward
from conmoe_edge.model.linears import quantisable_weights
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.levers import PRECISIONS, record_parts, scopes, spread
from conmoe_edge.plan.trace import Predictions
from conmoe_edge.plan.trim import pool_kept, trimmed


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done; everything that decides the bytes of the package.

    ``plan`` and ``source`` are plain JSON and go into the manifest as they are. ``predict``: fit a predictor of the
    next layer's prototypes, for packages that will not be all resident.
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


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a fit is. ``stage`` is ``locate``, ``write``, ``survey``, ``calibrate``, ``receipt`` or ``verify``;
    ``step`` of ``steps``
    are done in it; ``seconds_left`` is for the whole fit, once it can be told."""

    stage: str
    step: int
    steps: int
    detail: str = ""
    seconds_left: float | None = None
    device_bytes: int | None = None


OnProgress = Callable[[Progress], None]

_SURVEY_SEQUENCES = 8

_ADDS = 0.3
"""Most that a layer's output may differ from the sum of its parts, of what its experts bring."""


class Consolidation:
    """One run (or the rest of one) in the folders of a ``StagedFolder``."""

    def __init__(self, job: Job, package: Path, work: Path, progress: OnProgress) -> None:
        register()
        self.job = job
        self.package = package
        self.work = work
        self.journal = Journal.open(work)
        self.clock = Clock(self.journal.seconds)
        self.resumed_from = (
            self.journal.done if self.journal.phase in ("calibrate", "receipt") else 0
        )
        self._progress = progress
        self._kinds = PRECISIONS[job.precision].kinds
        self._method = METHODS[job.method]
        self._tokens: LayerTokens | None = None  # of the layer that has just run
        self._followed: LayerTokens | None = None  # of the layer that was just decided
        self._narrow = trimmed(job.anatomy, job.rate) if self._method.trims else job.anatomy
        self._layers = len(job.anatomy.layers)
        self._scope_of = {
            layer: scope for scope in scopes(job.anatomy, job.scope) for layer in scope
        }
        self._routing = RoutingRecorder({"held_out": job.held_out, "train": job.train})
        lengths = self._routing.lengths
        self._predictor = (
            PredictorFit(work, lengths, job.device) if job.predict and sum(lengths) >= 4 else None
        )
        self._done_here = 0
        self._layers_began = 0.0

    def run(self) -> Manifest:
        """Do what is left to do and return the manifest, not yet written."""
        with torch.no_grad(), disk_errors(self.package), ShardReader(self.job.index) as reader:
            if self.journal.phase == "prepare":
                self._prepare(reader)
            if self.journal.phase == "calibrate":
                model = self._streamed(reader)
                if self._shares_out() and not self.journal.budgets:
                    self._survey(model)
                self._calibrate(model)
            if self.journal.phase == "receipt":
                self._receipt()
        return self._manifest()

    # -- 1. everything that is not a routed expert ---------------------------------------------------------------

    def _prepare(self, reader: ShardReader) -> None:
        self._progress(Progress("write", 0, self._layers, "dense weights"))
        model = self._streamed(reader)
        dense = [
            key
            for layer in (None, *range(self._layers))
            for key in (model.outside_keys if layer is None else model.layer_keys(layer))
            if key not in model.expert_keys
        ]
        with self.clock.part("write"):
            for written in write_dense(
                self.package, dense_sources(reader, dense, self._in_int8(model))
            ):
                self._note(written)
            for written in copy_side_files(self.job.index.folder, self.package):
                self._note(written)
            config = read_json_object(self.job.index.folder / "config.json")
            config.pop("auto_map", None)  # names of code that is never run
            config["quantization_config"] = {
                "quant_method": "conmoe",
                "format_version": FORMAT_VERSION,
            }
            self._note(write_json(self.package / "config.json", config))
        self._save("calibrate", 0)

    # -- 2. the original, layer by layer -------------------------------------------------------------------------

    def _survey(self, model: StreamedModel) -> None:
        """What each layer is worth: the original over a few sequences, and beside it, from every MoE
        layer on, the stream in which only this layer was consolidated.
        """
        tokens = self.job.train.some(_SURVEY_SEQUENCES)
        with self.clock.part("survey"):
            model.load_outside()
            stream = open_stream(model, tokens)
            model.drop_outside()
            changed: dict[int, torch.Tensor] = {}
            curves: dict[int, list[float]] = {}
            for index in range(self._layers):
                self._announce("survey", index)
                with self._loaded(model, index, with_experts=True):
                    left = self._survey_layer(model, index, stream, changed)
                    if left is not None:
                        curves[index] = left
            model.load_outside()
            trackers = {layer: ReceiptTracker(tokens) for layer in curves}
            for row in range(len(tokens.domains)):
                wanted = sequence_logits(model, tokens, stream.hidden, row)
                for layer, tracker in trackers.items():
                    tracker.add(row, wanted, sequence_logits(model, tokens, changed[layer], row))
            model.drop_outside()
        worth = {
            layer: LayerWorth(tuple(left), trackers[layer].result()["kl"])
            for layer, left in curves.items()
        }
        for alike in scopes(
            self.job.anatomy, self._layers
        ):  # runs of layers whose records are alike
            counts = share_out([worth[layer] for layer in alike], self._uniform(alike[:1]))
            for layer, count in zip(alike, counts, strict=True):
                self.journal.budgets[str(layer)] = count
        self._save("calibrate", 0)

    def _survey_layer(
        self,
        model: StreamedModel,
        index: int,
        stream: Stream,
        changed: dict[int, torch.Tensor],
    ) -> list[float] | None:
        """Take all streams through a loaded layer; begin the one in which this layer is consolidated."""
        entered = stream.hidden.clone()
        tap = None
        if index in model.experts:
            module = model.experts[index][1]
            tap = RoutedTap()
            tap.tokens = TokenRecorder()
            attach(module, tap)
        run_layer(model, index, stream, tap)
        if tap is not None and tap.tokens is not None:
            taken, tap.tokens = tap.tokens.result(), None
        for hidden in changed.values():
            run_layer(model, index, Stream(stream.batches, stream.keep, hidden), tap)
        if tap is None:
            return None
        weights = LoadedLayer(module)

        def forward(expert: int, hidden: torch.Tensor) -> torch.Tensor:
            moved = hidden.to(model.device, model.dtype)
            return expert_forward(module, moved, weights.parts(expert), model.dtype)

        count = self._experts(index).count
        errors = slot_errors(taken.sample(SAMPLE_TOKENS), count, forward)
        chosen = select(errors, self._uniform((index,)))
        slots = [
            SlotRecord(None if prototype is None else ExpertId(index, prototype), scale)
            for prototype, scale in assign(errors, chosen)
        ]
        parts = {ExpertId(index, one): weights.parts(one) for one in chosen}
        mapped = MappedTap(slots, parts, None)
        attach(module, mapped)
        changed[index] = entered
        run_layer(model, index, Stream(stream.batches, stream.keep, entered), mapped)
        attach(module, RoutedTap())  # the tap holds on to the layer's weights
        return curve(errors)

    def _calibrate(self, model: StreamedModel) -> None:
        sets = {"train": self.job.train, "held_out": self.job.held_out}
        follows = self._method.needs.target
        if follows:
            sets["package"] = self.job.train
            sets["probe"] = self.job.train.some(1)
        streams = self._open_streams(model, sets, "calibrate")
        for index in range(self.journal.done, self._layers):
            self._announce("calibrate", index)
            with self._loaded(model, index, with_experts=True):
                self._statistics(model, index, streams)
                before = None
                if follows and index in model.experts:
                    before = self._aim(model, index, streams)
                if index in model.experts:
                    self._decide(model.experts[index][1], index)
                if follows:
                    self._follow(model, index, streams["package"], before)
            self._layer_done("calibrate", index, streams)
        layers = tuple(layer.index for layer in self.job.anatomy.moe_layers)
        routing = self._routing.write(self.work, self.package, layers)
        if routing is not None:
            self._note(routing)
        if self._predictor is not None:
            self._note(self._predictor.write(self.package, self._numbers()))
        constants = {
            layer: found for layer in layers if (found := self._constants_of(layer)) is not None
        }
        if constants:
            self._note(write_constants(self.package / CONSTANTS_FILE, constants))
        self.journal.save_hidden("original", 0, {"held_out": streams["held_out"].hidden})
        self._done_here = 0
        self._save("receipt", 0)
        self._routing.drop(self.work, layers)
        self.journal.drop_hidden("calibrate", self._layers)

    def _statistics(self, model: StreamedModel, index: int, streams: Mapping[str, Stream]) -> None:
        tap = None
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
                experts = self._experts(index)
                tap.tracker = StatisticsTracker(experts.count) if name == "train" else None
                self._routing.start_set(name)
                tap.sample = self._sample(experts) if name == "train" else None
                needs = self._method.needs
                wanted = name == "train" and needs.tokens and not needs.target
                tap.tokens = TokenRecorder() if wanted else None
            run_layer(model, index, streams[name], tap)
            if tap is not None and tap.tracker is not None:
                self.journal.statistics[str(index)] = tap.tracker.result().to_json()
            if tap is not None and tap.tokens is not None:
                self._tokens = tap.tokens.result()
            if tap is not None and tap.sample is not None:
                save_sample(self._sample_file(index), tap.sample.tensors())
        if tap is not None:
            self._routing.save_layer(self.work, index)
        inside = 0.0 if tap is None else tap.seconds
        self.clock.add("experts", inside)
        self.clock.add("attention", time.perf_counter() - start - inside)
        if tap is not None and self._predictor is not None:
            with self.clock.part("predictor"):
                before = [one.index for one in self.job.anatomy.moe_layers if one.index < index]
                hidden, slots = self._routing.taken()
                count = self._experts(index).count
                self._predictor.layer(index, max(before, default=None), hidden, slots, count)

    def _aim(
        self, model: StreamedModel, index: int, streams: Mapping[str, Stream]
    ) -> torch.Tensor | None:
        """The tokens of the package's stream at this layer, each with what its experts should give.

        Where a layer adds its experts' output to what it gives without them, that is the way back to
        the original's stream, and the stream without the experts is returned, for ``_follow``.
        Elsewhere (a norm comes after the experts) it is what the original experts give here.
        """
        module = model.experts[index][1]
        stream = streams["package"]
        with self.clock.part("attention"):
            entered = stream.hidden.clone()
            own = RoutedTap()
            attach(module, own)
            one = streams["probe"]  # the first sequence alone
            one.hidden = entered[:1].clone()
            run_layer(model, index, one, own)
            silent = SilentTap()
            attach(module, silent)
            run_layer(model, index, stream, silent)
            tokens = silent.tokens.result()
            plain = expert_sum(module, own, tokens.rows(torch.arange(one.tokens)), model.device)
            given = (one.hidden.float() - stream.hidden[:1].float()).double()
            off = given - one.padded(plain.float()).double()
            # Rounding of the sum to 16 bits is a few per cent of it; a norm in between changes all.
            if float(off.norm()) <= _ADDS * float(given.norm()):
                gap = streams["train"].hidden.float() - stream.hidden.float()
                target = stream.real_rows(gap)
                before = stream.hidden
            else:
                target = expert_sum(module, own, tokens, model.device)
                before = None
                stream.hidden = entered
        self._tokens = replace(tokens, target=target)
        return before

    def _follow(
        self, model: StreamedModel, index: int, stream: Stream, before: torch.Tensor | None
    ) -> None:
        """Take the package's stream through the layer as it was just written."""
        start = time.perf_counter()
        if index in model.experts:
            file = f"prototypes-{index:05d}.safetensors"
            with ShardReader(index_files(self.package, [file])) as reader:
                tap = self._mapped(index, reader)
                module = model.experts[index][1]
                if before is not None:
                    assert self._followed is not None
                    stream.add_rows(expert_sum(module, tap, self._followed, model.device))
                    self._followed = None
                    self.clock.add("experts", time.perf_counter() - start)
                    return
                attach(module, tap)
                run_layer(model, index, stream, tap)
                attach(module, RoutedTap())  # the tap holds on to the prototypes
        else:
            run_layer(model, index, stream, None)
        self.clock.add("experts", time.perf_counter() - start)

    def _decide(self, module: nn.Module, index: int) -> None:
        """At the last layer of a scope: decide and write its prototypes. Before that: keep the layer's experts."""
        scope = self._scope_of[index]
        source = make_layout(record_parts(self._experts(index), "source"), "source")
        transposed = self._experts(index).transposed
        here = LoadedLayer(module)
        pool = pool_of(self.job.anatomy, scope)
        if index != scope[-1]:
            own = [expert for expert in pool if expert.layer == index]
            with self.clock.part("write"):
                write_experts(
                    self._scratch(index),
                    [(expert, source) for expert in own],
                    ScopeWeights({index: here}, matrix_views(module)).parts,
                    transposed=transposed,
                )
                if self._tokens is not None:
                    self._tokens.save(self._tokens_file(index))
                    self._tokens = None
            return
        layers: dict[int, LayerWeights] = {index: here}
        earlier = [ScratchLayer(self._scratch(layer), source) for layer in scope[:-1]]
        layers.update(zip(scope[:-1], earlier, strict=True))
        weights = ScopeWeights(layers, matrix_views(module))
        decision = self._decision(pool, scope, weights, module)
        self._followed, self._tokens = self._tokens, None
        parts = weights.parts if decision.parts is None else decision.parts
        with self.clock.part("precision"):
            kinds = self._kinds_of(module, scope, pool, decision, parts)
        with self.clock.part("write"):
            path = self.package / f"prototypes-{scope[0]:05d}.safetensors"
            layouts = {kind: self._layout(index, kind) for kind in self._kinds}
            records = [(expert, layouts[kind]) for expert, kind in kinds.items()]
            written = write_experts(path, records, parts, transposed=transposed)
        self._note(written)
        for expert, kind in kinds.items():
            name = record_name(expert)
            self.journal.records[name] = [written.name, written.offsets[name], kind]
        self._keep_decision(pool, decision, weights)
        for layer in earlier:
            layer.close()

    def _keep_decision(
        self, pool: Sequence[ExpertId], decision: Decision, weights: ScopeWeights
    ) -> None:
        """Slots, their distances and notes into the journal, constants beside it."""
        with self.clock.part("distance"):
            self.journal.distances.update(slot_distances(pool, decision.slots, weights))
        for layer, constants in sorted(decision.constants.items()):
            file = self._constants_file(layer)
            write_constants(file, {layer: constants})
        for layer in sorted({expert.layer for expert in pool}):
            self.journal.decisions[str(layer)] = [
                [
                    list(record.prototype) if record.prototype else None,
                    record.scale,
                    record.constant,
                ]
                for expert, record in zip(pool, decision.slots, strict=True)
                if expert.layer == layer
            ]
        for layer in sorted(decision.rerouted):
            self.journal.rerouted[str(layer)] = True
        self.journal.notes += [note for note in decision.notes if note not in self.journal.notes]

    def _decision(
        self,
        pool: Sequence[ExpertId],
        layers: Sequence[int],
        weights: ScopeWeights,
        module: nn.Module,
    ) -> Decision:
        def measure() -> torch.Tensor:
            with self.clock.part("distance"):
                return distances(weights)

        def view_of(layer: int) -> LayerView:
            tokens = self._tokens
            if layer != layers[-1] and self._method.needs.tokens:
                tokens = LayerTokens.load(self._tokens_file(layer))
            return LayerView(
                layer,
                self._experts(layer).count,
                self._top_k(layer),
                self._statistics_of(layer),
                tokens,
            )

        scope = ScopeView(
            tuple(pool),
            tuple(view_of(layer) for layer in layers),
            weights,
            measure,
            module,
            self._narrowed(layers[-1]).width,
            compute_dtype(self.job.device, getattr(torch, self.job.anatomy.dtype)),
            self.job.device,
        )
        with self.clock.part("method"):
            return self._method.decide(scope, self._count(layers))

    def _kinds_of(
        self,
        module: nn.Module,
        scope: Sequence[int],
        pool: Sequence[ExpertId],
        decision: Decision,
        parts: Callable[[ExpertId], Mapping[str, torch.Tensor]],
    ) -> dict[ExpertId, str]:
        """The kind of record of each prototype: in a mixed precision the wide one where it helps most."""
        if len(self._kinds) == 1:
            return dict.fromkeys(decision.prototypes, self._kinds[0])
        wide, narrow = self._kinds
        every = scopes(self.job.anatomy, self.job.scope)
        counts = [self._count(one) for one in every]
        count = spread(self.job.wide_prototypes, counts)[every.index(tuple(scope))]
        if count in (0, len(decision.prototypes)):
            return dict.fromkeys(decision.prototypes, wide if count else narrow)
        found = gains(
            module,
            decision.prototypes,
            decision.slots,
            pool,
            {layer: load_sample(self._sample_file(layer)) for layer in scope},
            parts,
            (self._layout(scope[0], wide), self._layout(scope[0], narrow)),
            compute_dtype(self.job.device, getattr(torch, self.job.anatomy.dtype)),
            self.job.device,
        )
        chosen = widest(found, count)
        return {
            expert: wide if position in chosen else narrow
            for position, expert in enumerate(decision.prototypes)
        }

    def _sample(self, experts: ExpertsAnatomy) -> RowSample | None:
        """Where the precision is mixed: hidden rows to measure it on."""
        if len(self._kinds) == 1:
            return None
        return RowSample(experts.count, self.job.anatomy.hidden_size)

    # -- 3. the package, layer by layer --------------------------------------------------------------------------

    def _receipt(self) -> None:
        index = CheckpointIndex.open(self.package)
        files = sorted({file for file, _, _ in self.journal.records.values()})
        records = index_files(self.package, files)
        with ShardReader(index) as dense, ShardReader(records) as prototypes:
            package = self._streamed(Dequantised(dense))
            streams = self._open_streams(package, {"held_out": self.job.held_out}, "receipt")
            for layer in range(self.journal.done, self._layers):
                self._announce("receipt", layer)
                with self._loaded(package, layer, with_experts=False):
                    tap = None
                    if layer in package.experts:
                        with self.clock.part("read"):
                            tap = self._mapped(layer, prototypes)
                        attach(package.experts[layer][1], tap)
                    start = time.perf_counter()
                    run_layer(package, layer, streams["held_out"], tap, "the package")
                    self.clock.add("receipt", time.perf_counter() - start)
                    if tap is not None:
                        attach(package.experts[layer][1], RoutedTap())
                self._layer_done("receipt", layer, streams)
            with self.clock.part("read"):
                package.load_outside()
            with self.clock.part("receipt"):
                self.journal.receipt = self._compare(package, streams["held_out"])
        self._save("done", 0)
        self.journal.drop_hidden("receipt", self._layers)

    def _mapped(self, layer: int, reader: ShardReader) -> MappedTap:
        slots = self._slots(layer)
        parts = {}
        for expert in sorted({slot.prototype for slot in slots if slot.prototype is not None}):
            record = reader[record_name(expert)][...]
            layout = self._layout(layer, self.journal.records[record_name(expert)][2])
            parts[expert] = {
                name: part.to(self.job.device) for name, part in view(layout, record).items()
            }
        return MappedTap(slots, parts, self._constants_of(layer))

    def _compare(self, package: StreamedModel, after: Stream) -> dict[str, Any]:
        """The hidden states of both through norm and head: the original's, and the package's.

        Where nothing dense is quantised these are the same bytes, and are loaded once.
        """
        hidden = self.journal.load_hidden("original", 0)["held_out"]
        tokens = self.job.held_out
        tracker = ReceiptTracker(tokens)
        with ShardReader(self.job.index) as reader:
            original = package
            if self.job.dense_precision != "source":
                original = self._streamed(reader)
                original.load_outside()
            for row in range(tokens.ids.shape[0]):
                before = sequence_logits(original, tokens, hidden, row)
                tracker.add(row, before, sequence_logits(package, tokens, after.hidden, row))
        return tracker.result()

    def _in_int8(self, model: StreamedModel) -> frozenset[str]:
        """The dense weights that the package stores in int8."""
        if self.job.dense_precision == "source":
            return frozenset()
        targets = targets_of(model.model, self.job.index.tensors)
        return frozenset(quantisable_weights(model.model, targets))

    # -- shared --------------------------------------------------------------------------------------------------

    def _streamed(self, reader: Mapping[str, Any]) -> StreamedModel:
        source = getattr(torch, self.job.anatomy.dtype)
        experts = self.job.anatomy.moe_layers[0].experts
        assert experts is not None
        model = StreamedModel(
            self.job.config,
            list(reader),
            lambda keys: {key: reader[key] for key in keys},
            dtype=compute_dtype(self.job.device, source),
            experts_dtype=getattr(torch, experts.parts[0].dtype),
            device=self.job.device,
            experts_implementation=IMPLEMENTATION,
        )
        return model

    def _open_streams(
        self, model: StreamedModel, sets: Mapping[str, TokenSet], phase: str
    ) -> dict[str, Stream]:
        with self.clock.part("read"):
            model.load_outside()
        hidden = self.journal.load_hidden(phase, self.journal.done) if self.journal.done else {}
        with self.clock.part("attention"):
            streams = {
                name: open_stream(model, tokens, hidden.get(name)) for name, tokens in sets.items()
            }
        model.drop_outside()
        return streams

    def _loaded(self, model: StreamedModel, index: int, *, with_experts: bool) -> _TimedLayer:
        return _TimedLayer(model, index, with_experts, self.clock)

    def _layer_done(self, phase: str, index: int, streams: Mapping[str, Stream]) -> None:
        with self.clock.part("journal"):
            self.journal.save_hidden(
                phase, index + 1, {name: stream.hidden for name, stream in streams.items()}
            )
            self._save(phase, index + 1)
            self.journal.drop_hidden(phase, index)
            if index in self._scope_of and index == self._scope_of[index][-1]:
                for layer in self._scope_of[index]:
                    self._scratch(layer).unlink(missing_ok=True)
                    self._sample_file(layer).unlink(missing_ok=True)
                    self._tokens_file(layer).unlink(missing_ok=True)
        self._done_here += 1

    def _save(self, phase: str, done: int) -> None:
        self.journal.phase, self.journal.done = phase, done
        self.journal.seconds = dict(self.clock.seconds)
        self.journal.save()

    def _announce(self, stage: str, layer: int) -> None:
        left = None
        if not self._done_here:
            self._layers_began = time.perf_counter()
        else:
            per_layer = (time.perf_counter() - self._layers_began) / self._done_here
            # A layer of the receipt runs the held-out tokens only.
            share = self.job.held_out.ids.numel() / (
                self.job.held_out.ids.numel() + self.job.train.ids.numel()
            )
            rest = self._layers - layer
            left = per_layer * (rest + (share * self._layers if stage == "calibrate" else 0))
        self._progress(
            Progress(
                stage, layer, self._layers, f"layer {layer + 1}", left, _in_use(self.job.device)
            )
        )

    def _note(self, written: WrittenFile) -> None:
        self.journal.files[written.name] = written.entry()

    def _scratch(self, layer: int) -> Path:
        return self.work / f"experts-{layer:05d}.safetensors"

    def _sample_file(self, layer: int) -> Path:
        return self.work / f"sample-{layer:05d}.safetensors"

    def _tokens_file(self, layer: int) -> Path:
        return self.work / f"tokens-{layer:05d}.safetensors"

    def _constants_file(self, layer: int) -> Path:
        return self.work / f"constants-{layer:05d}.safetensors"

    def _constants_of(self, layer: int) -> torch.Tensor | None:
        path = self._constants_file(layer)
        return read_constants(path)[layer] if path.is_file() else None

    def _top_k(self, layer: int) -> int:
        return self._experts(layer).top_k

    def _experts(self, layer: int) -> ExpertsAnatomy:
        experts = self.job.anatomy.layers[layer].experts
        assert experts is not None
        return experts

    def _narrowed(self, layer: int) -> ExpertsAnatomy:
        """A prototype of the package, which may have fewer neurons than an expert."""
        experts = self._narrow.layers[layer].experts
        assert experts is not None
        return experts

    def _shares_out(self) -> bool:
        """Whether layers get numbers of their own. In a mixed precision the plan has counted with equal ones."""
        return self._method.budgets and self.job.rate > 0.0 and len(self._kinds) == 1

    def _count(self, layers: Sequence[int]) -> int:
        """Prototypes of a scope."""
        given = self.journal.budgets.get(str(layers[0]))
        return self._uniform(layers) if given is None else given

    def _uniform(self, layers: Sequence[int]) -> int:
        """Prototypes of a scope where all get the same number."""
        return pool_kept(self.job.anatomy, layers, self.job.rate, self._method.trims)

    def _layout(self, layer: int, kind: str) -> RecordLayout:
        return make_layout(record_parts(self._narrowed(layer), kind), kind)

    def _statistics_of(self, layer: int) -> LayerStatistics:
        return LayerStatistics.from_json(self.journal.statistics[str(layer)])

    def _slots(self, layer: int) -> tuple[SlotRecord, ...]:
        return tuple(
            SlotRecord(ExpertId(*prototype) if prototype else None, scale, constant)
            for prototype, scale, constant in self.journal.decisions[str(layer)]
        )

    def _numbers(self) -> dict[int, list[int]]:
        """MoE layer -> prototype number of every router slot, -1 where a slot has none."""
        number = {
            expert: n for n, expert in enumerate(sorted(map(_expert_of, self.journal.records)))
        }
        return {
            layer.index: [
                -1 if slot.prototype is None else number[slot.prototype]
                for slot in self._slots(layer.index)
            ]
            for layer in self.job.anatomy.moe_layers
        }

    def predictions(self) -> Predictions | None:
        """After ``run``: what the package's predictor says about tokens that it was not fitted on."""
        return None if self._predictor is None else self._predictor.predictions(self._numbers())

    def _manifest(self) -> Manifest:
        layers = [layer.index for layer in self.job.anatomy.moe_layers]
        slots = {layer: self._slots(layer) for layer in layers}
        carried: dict[ExpertId, float] = {}
        total = sum(sum(self._statistics_of(layer).gates) for layer in layers) or 1.0
        for layer in layers:
            for record, gates in zip(slots[layer], self._statistics_of(layer).gates, strict=True):
                if record.prototype is not None:
                    carried[record.prototype] = carried.get(record.prototype, 0.0) + gates
        layouts: list[RecordLayout] = []
        entries = []
        for expert in sorted(_expert_of(name) for name in self.journal.records):
            file, offset, kind = self.journal.records[record_name(expert)]
            layout = self._layout(expert.layer, kind)
            if layout not in layouts:
                layouts.append(layout)
            weight = carried.get(expert, 0.0) / total
            entries.append(PrototypeEntry(expert, file, offset, layouts.index(layout), weight))
        return Manifest(
            source=dict(self.job.source),
            method=self.job.method,
            rate=self.job.rate,
            scope=self.job.scope,
            precision=self.job.precision,
            dense_precision=self.job.dense_precision,
            layouts=tuple(layouts),
            prototypes=tuple(entries),
            slots=slots,
            files=dict(sorted(self.journal.files.items())),
            plan=dict(self.job.plan),
            receipt=self.journal.receipt,
            overview=overview_of(
                {layer: self._statistics_of(layer) for layer in layers}, self.journal.distances
            ),
            tool_version=self.job.tool_version,
        )


class _TimedLayer:
    """A loaded layer whose reading is timed."""

    def __init__(self, model: StreamedModel, index: int, with_experts: bool, clock: Clock) -> None:
        self._context = model.layer(index, with_experts=with_experts)
        self._clock = clock

    def __enter__(self) -> nn.Module:
        trim_heap()  # what the activations of the layer before left in pieces
        with self._clock.part("read"):
            return self._context.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)
        trim_heap()


def _expert_of(name: str) -> ExpertId:
    _, layer, expert = name.split(".")
    return ExpertId(int(layer), int(expert))


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss
