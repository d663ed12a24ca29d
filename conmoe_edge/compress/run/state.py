"""What all phases of one consolidation share: the job, its folders, its journal, and what follows from them.

Nothing is decided here. Peak memory: what a phase loads through it, see there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout, SlotRecord
from conmoe_edge.checkpoint.format.records import make_layout
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.checkpoint.package.slot_constants import read_constants
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.run.job import Job, OnProgress, Progress
from conmoe_edge.compress.run.journal import Journal
from conmoe_edge.compress.stats.statistics import LayerStatistics
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.expert_hooks import IMPLEMENTATION, MappedTap
from conmoe_edge.compress.stream.layer_stream import Stream, compute_dtype, open_stream
from conmoe_edge.compress.stream.streamed_model import mapped_tap, timed_layer
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.model.anatomy import ExpertsAnatomy
from conmoe_edge.model.bridge import targets_of
from conmoe_edge.model.linears import quantisable_weights
from conmoe_edge.model.rerouting import rerouted
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.levers import PRECISIONS, record_bytes, record_parts, scopes
from conmoe_edge.plan.width_levers import PARTS, alike, pool_kept, steps, trimmed


class Run:
    """One consolidation (or the rest of one) in the folders of a ``StagedFolder``.

    Attributes:
        differs: whether the prototypes of a layer have different numbers of neurons.
        kinds: the kinds of record that the precision allows, the widest first.
        layers: decoder layers.
        scope_of: MoE layer -> the layers of its scope.
        resumed_from: layers that an earlier run had done in the phase that goes on.
    """

    def __init__(self, job: Job, package: Path, work: Path, progress: OnProgress) -> None:
        self.job = job
        self.package = package
        self.work = work
        self.journal = Journal.open(work)
        self.clock = Clock(self.journal.seconds)
        self.resumed_from = (
            self.journal.done if self.journal.phase in ("calibrate", "receipt") else 0
        )
        self.progress = progress
        self.kinds = PRECISIONS[job.precision].kinds
        self.method = METHODS[job.method]
        self._narrow = job.anatomy
        self.differs = self.method.trims and not alike(job.precision, equal=job.equal)
        if self.method.trims and not self.differs:
            self._narrow = trimmed(job.anatomy, job.rate, job.precision)
        self.layers = len(job.anatomy.layers)
        self.scope_of = {
            layer: scope for scope in scopes(job.anatomy, job.scope) for layer in scope
        }
        self.done_here = 0
        self._layers_began = 0.0

    # -- models and streams --------------------------------------------------------------------------------------

    def streamed(self, reader: Mapping[str, Any]) -> StreamedModel:
        experts = self.job.anatomy.moe_layers[0].experts
        assert experts is not None
        model = StreamedModel(
            self.job.config,
            list(reader),
            lambda keys: {key: reader[key] for key in keys},
            dtype=self.dtype,
            experts_dtype=getattr(torch, experts.parts[0].dtype),
            device=self.job.device,
            experts_implementation=IMPLEMENTATION,
        )
        return model

    def open_streams(
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

    def loaded(self, model: StreamedModel, index: int) -> AbstractContextManager[nn.Module]:
        """A layer of the original."""
        return timed_layer(model, index, self.clock, with_experts=True)

    def layer_done(self, phase: str, index: int, streams: Mapping[str, Stream]) -> None:
        with self.clock.part("journal"):
            self.journal.save_hidden(
                phase, index + 1, {name: stream.hidden for name, stream in streams.items()}
            )
            self.save(phase, index + 1)
            self.journal.drop_hidden(phase, index)
            if index in self.scope_of and index == self.scope_of[index][-1]:
                for layer in self.scope_of[index]:
                    self.scratch(layer).unlink(missing_ok=True)
                    self.sample_file(layer).unlink(missing_ok=True)
                    self.tokens_file(layer).unlink(missing_ok=True)
                    self.vectors_file(layer).unlink(missing_ok=True)
        self.done_here += 1

    def save(self, phase: str, done: int) -> None:
        self.journal.phase, self.journal.done = phase, done
        self.journal.seconds = dict(self.clock.seconds)
        self.journal.save()

    # -- progress ------------------------------------------------------------------------------------------------

    def announce(self, stage: str, layer: int) -> None:
        left = None
        if not self.done_here:
            self._layers_began = time.perf_counter()
        else:
            per_layer = (time.perf_counter() - self._layers_began) / self.done_here
            # A layer of the receipt runs the held-out tokens only.
            share = self.job.held_out.ids.numel() / (
                self.job.held_out.ids.numel() + self.job.train.ids.numel()
            )
            rest = self.layers - layer
            left = per_layer * (rest + (share * self.layers if stage == "calibrate" else 0))
        self.progress(
            Progress(
                stage, layer, self.layers, f"layer {layer + 1}", left, _in_use(self.job.device)
            )
        )

    def note(self, written: WrittenFile) -> None:
        self.journal.files[written.name] = written.entry()

    # -- files of the work folder --------------------------------------------------------------------------------

    def scratch(self, layer: int) -> Path:
        return self.work / f"experts-{layer:05d}.safetensors"

    def sample_file(self, layer: int) -> Path:
        return self.work / f"sample-{layer:05d}.safetensors"

    def tokens_file(self, layer: int) -> Path:
        return self.work / f"tokens-{layer:05d}.safetensors"

    def vectors_file(self, layer: int) -> Path:
        return self.work / f"vectors-{layer:05d}.safetensors"

    def constants_file(self, layer: int) -> Path:
        return self.work / f"constants-{layer:05d}.safetensors"

    def constants_of(self, layer: int) -> torch.Tensor | None:
        path = self.constants_file(layer)
        return read_constants(path)[layer] if path.is_file() else None

    # -- what the model and the plan say -------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """In which experts are computed, and the streams."""
        return compute_dtype(self.job.device, getattr(torch, self.job.anatomy.dtype))

    def top_k(self, layer: int) -> int:
        return self.experts(layer).top_k

    def experts(self, layer: int) -> ExpertsAnatomy:
        experts = self.job.anatomy.layers[layer].experts
        assert experts is not None
        return experts

    def widths(self, layer: int) -> tuple[int, ...]:
        """Numbers of neurons that a prototype of the package may have, ascending."""
        if self.differs:
            return steps(self.experts(layer), self.job.precision)
        experts = self._narrow.layers[layer].experts
        assert experts is not None
        return (experts.width,)

    def sizes(self, layer: int) -> tuple[int, ...]:
        """Bytes of the smallest record of every width."""
        experts = self.experts(layer)
        return tuple(
            record_bytes(experts.narrowed(width), self.kinds[-1]) for width in self.widths(layer)
        )

    def unit(self, layer: int) -> int:
        """Bytes of what ``count`` counts: a prototype, or a part of one where widths differ."""
        return self.sizes(layer)[-1] // (PARTS if self.differs else 1)

    def room(self, layers: Sequence[int]) -> int:
        """Bytes for the prototypes of a scope: its own, and what scopes before it have left."""
        scopes_before = [
            one for one in dict.fromkeys(self.scope_of.values()) if one <= tuple(layers)
        ]
        given = sum(self.count(one) * self.unit(one[0]) for one in scopes_before)
        taken = sum(
            self.layout(expert_of(name).layer, kind, width).nbytes
            for name, (_, _, kind, width) in self.journal.records.items()
            if expert_of(name).layer < layers[0]
        )
        return given - taken

    def shares_out(self) -> bool:
        """Whether layers get numbers of their own. In a mixed precision the plan has counted with equal ones."""
        return self.method.budgets and self.job.rate > 0.0 and len(self.kinds) == 1

    def count(self, layers: Sequence[int]) -> int:
        """Prototypes of a scope, or parts of them where their widths differ (``unit``)."""
        given = self.journal.budgets.get(str(layers[0]))
        return self.uniform(layers) if given is None else given

    def uniform(self, layers: Sequence[int]) -> int:
        """The same where all scopes get the same."""
        job = self.job
        trims = self.method.trims and not self.differs
        count = pool_kept(job.anatomy, layers, job.rate, job.precision, trims=trims)
        return count * PARTS if self.differs else count

    def layout(self, layer: int, kind: str, width: int) -> RecordLayout:
        return make_layout(record_parts(self.experts(layer).narrowed(width), kind), kind)

    def statistics_of(self, layer: int) -> LayerStatistics:
        return LayerStatistics.from_json(self.journal.statistics[str(layer)])

    def slots(self, layer: int) -> tuple[SlotRecord, ...]:
        return tuple(
            SlotRecord(ExpertId(*prototype) if prototype else None, scale, constant)
            for prototype, scale, constant in self.journal.decisions[str(layer)]
        )

    def is_rerouted(self, layer: int) -> bool:
        """Whether the router of the package's layer may choose slots with something behind them only."""
        return self.journal.rerouted.get(str(layer), False)

    def rerouting(self, model: StreamedModel, layer: int) -> AbstractContextManager[None]:
        """The layer's router as it is in the package."""
        is_open = self.open_slots(layer)
        return nullcontext() if is_open is None else rerouted(model.routers()[layer], is_open)

    def open_slots(self, layer: int) -> list[bool] | None:
        """Which slots the router of the package's layer may choose; ``None`` where it is as it was."""
        if not self.is_rerouted(layer):
            return None
        return [not slot.dropped for slot in self.slots(layer)]

    def numbers(self) -> dict[int, list[int]]:
        """MoE layer -> prototype number of every router slot, -1 where a slot has none."""
        number = {
            expert: n for n, expert in enumerate(sorted(map(expert_of, self.journal.records)))
        }
        return {
            layer.index: [
                -1 if slot.prototype is None else number[slot.prototype]
                for slot in self.slots(layer.index)
            ]
            for layer in self.job.anatomy.moe_layers
        }

    def mapped(self, layer: int, reader: ShardReader) -> MappedTap:
        def layout_of(name: str) -> RecordLayout:
            _, _, kind, width = self.journal.records[name]
            return self.layout(layer, kind, width)

        return mapped_tap(
            self.slots(layer),
            reader,
            layout_of,
            self.constants_of(layer),
            self.job.device,
            self.is_rerouted(layer),
        )

    def in_int8(self, model: StreamedModel) -> frozenset[str]:
        """The dense weights that the package stores in int8."""
        if self.job.dense_precision == "source":
            return frozenset()
        targets = targets_of(model.model, self.job.index.tensors)
        return frozenset(quantisable_weights(model.model, targets))


def expert_of(name: str) -> ExpertId:
    """The expert whose record has this name."""
    _, layer, expert = name.split(".")
    return ExpertId(int(layer), int(expert))


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss
