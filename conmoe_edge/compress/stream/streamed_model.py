"""A checkpoint with its own experts or a package with its prototypes, streamed layer by layer in the same way.

A decoder layer is loaded with or without its experts, a tap computes them, the layer is dropped. ``open_subject`` opens
either from a folder, ``package_subject`` a package whose manifest is at hand.

Peak memory: what ``StreamedModel`` says; a package's layer has its prototypes in place of experts.
Raises ``PackageError``, ``CheckpointError``, ``UnsupportedModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from conmoe_edge.checkpoint.format.manifest import (
    MANIFEST_NAME,
    UNCHANGED,
    Manifest,
    RecordLayout,
)
from conmoe_edge.checkpoint.format.record_check import RecordCheck
from conmoe_edge.checkpoint.format.records import view
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.fs.contained import is_there
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.checkpoint.package.record_headers import record_index, record_name
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.checkpoint.package.small_tensors import damaged
from conmoe_edge.checkpoint.package.verify_values import NOT_NUMBERS, is_broken
from conmoe_edge.checkpoint.quantised.expanded import ExpandedTensors
from conmoe_edge.checkpoint.quantised.stored import stored_in
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.dense_conversion import Dequantised
from conmoe_edge.compress.stream.expert_hooks import (
    IMPLEMENTATION,
    MappedTap,
    RoutedTap,
    Tap,
    attach,
    register,
)
from conmoe_edge.compress.stream.layer_stream import (
    Stream,
    compute_dtype,
    open_stream,
    run_layer,
)
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.errors import PackageError
from conmoe_edge.memory.heap import trim_heap
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.bridge import read_config, without_quantization
from conmoe_edge.model.experts import part_names
from conmoe_edge.model.opened import OpenedModel
from conmoe_edge.model.probe import facts_of, probe
from conmoe_edge.model.record_match import check_records, token_size
from conmoe_edge.model.rerouting import rerouted
from conmoe_edge.model.size_bounds import bounds_of
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.model.source_facts import read_source
from conmoe_edge.model.streaming import StreamedModel
from conmoe_edge.plan.kv_precision import with_kv

_AGAIN = "Make the package again with conmoe-edge fit, or copy it again from where it came from."


class Subject:
    """A streamed model and what computes its experts.

    Args:
        model: the model.
        mapped: gives the tap of a MoE layer of a package; ``None`` for a model with its own experts.
        name: for errors.
        prototype_bytes: what ``mapped`` reads over all layers.
        closed: for every rerouted layer which slots its router may choose.
        kv_precision: how keys and values are kept where it runs.

    Raises:
        UnsupportedModel: the router of a rerouted layer cannot be found.
    """

    def __init__(
        self,
        model: StreamedModel,
        mapped: Callable[[int], Tap] | None = None,
        name: str = "",
        prototype_bytes: int = 0,
        closed: Mapping[int, Sequence[bool]] | None = None,
        kv_precision: str = "source",
    ) -> None:
        self.model = model
        self.name = name
        self.kv_precision = kv_precision
        self._mapped = mapped
        self._prototype_bytes = prototype_bytes
        self._closed = closed or {}
        if self._closed:
            model.routers()  # looked for while nothing is loaded

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.model.layers)

    @property
    def memory_bytes(self) -> int:
        """What the whole model would take in memory as it is computed here."""
        experts = {id(p) for _, m in self.model.experts.values() for p in m.parameters()}
        return self._prototype_bytes + sum(
            parameter.numel() * parameter.element_size()
            for parameter in self.model.model.parameters()
            if self._mapped is None or id(parameter) not in experts
        )

    @contextmanager
    def layer(self, index: int, clock: Clock) -> Iterator[nn.Module]:
        """Decoder layer ``index`` with what computes its experts; dropped on leaving."""
        with timed_layer(self.model, index, clock, with_experts=self._mapped is None) as layer:
            if index not in self.model.experts:
                yield layer
                return
            module = self.model.experts[index][1]
            with clock.part("read"):
                attach(module, RoutedTap() if self._mapped is None else self._mapped(index))
            try:
                with ExitStack() as stack:
                    if index in self._closed:
                        router = self.model.routers()[index]
                        stack.enter_context(rerouted(router, self._closed[index]))
                    yield layer
            finally:
                attach(module, RoutedTap())  # the tap holds on to the prototypes

    @contextmanager
    def held(self, clock: Clock) -> Iterator[None]:
        """All decoder layers at once, for models that fit in memory."""
        with ExitStack() as stack:
            for index in range(self.layers):
                stack.enter_context(self.layer(index, clock))
            yield

    def open_stream(self, tokens: TokenSet) -> Stream:
        """A token set in front of the first layer; what is outside the layers is loaded."""
        return open_stream(self.model, tokens, kv_precision=self.kv_precision)

    def advance(self, index: int, stream: Stream) -> None:
        """Take a stream through a loaded layer, in place."""
        tap = self.model.experts[index][1]._conmoe_tap if index in self.model.experts else None
        run_layer(self.model, index, stream, tap, self.name)  # type: ignore[arg-type]


@contextmanager
def timed_layer(
    model: StreamedModel, index: int, clock: Clock, *, with_experts: bool
) -> Iterator[nn.Module]:
    """A loaded layer whose reading is timed; the heap is trimmed before and after."""
    with ExitStack() as stack:
        trim_heap()  # what the activations of the layer before left in pieces
        with clock.part("read"):
            layer = stack.enter_context(model.layer(index, with_experts=with_experts))
        yield layer
    trim_heap()


def mapped_tap(
    slot_map: SlotMap,
    records: Mapping[int, tuple[str, RecordLayout]],
    reader: ShardReader,
    constants: Tensor | None,
    device: torch.device,
    is_open: Sequence[bool] | None = None,
) -> MappedTap:
    """The tap of one layer of a package; its prototypes are read from ``reader`` now.

    Args:
        slot_map: of the layer.
        records: prototype number -> name and layout of its record.
        reader: of the files with these records.
        constants: [C, H] of the layer, or ``None``.
        device: where the layer runs.
        is_open: as of ``MappedTap``.
    """
    parts = {}
    for number in slot_map.prototypes:
        name, layout = records[number]
        record = reader[name][...]
        why, held = RecordCheck(layout).wrong(record), view(layout, record)
        for part, tensor in held.items():
            if not why and is_broken(tensor):
                why = f"{part} {NOT_NUMBERS}"
        if why:
            raise damaged(reader.index.folder / reader.index.tensors[name].file, f"{why} in {name}")
        parts[number] = {part: tensor.to(device) for part, tensor in held.items()}
    return MappedTap(SlotTensors.of(slot_map, constants, device), parts, is_open)


def stream_model(
    config: PretrainedConfig,
    anatomy: ModelAnatomy,
    tensors: Mapping[str, Any],
    device: torch.device,
) -> StreamedModel:
    """A checkpoint whose experts are computed by taps; nothing is loaded yet. ``tensors``: lazily read, by name."""
    experts = anatomy.moe_layers[0].experts
    assert experts is not None
    return StreamedModel(
        config,
        list(tensors),
        lambda keys: {key: tensors[key] for key in keys},
        dtype=compute_dtype(device, getattr(torch, anatomy.dtype)),
        experts_dtype=getattr(torch, experts.parts[0].dtype),
        device=device,
        experts_implementation=IMPLEMENTATION,
    )


@contextmanager
def open_subject(
    folder: Path | OpenedModel, device: torch.device, kv_precision: str | None = None
) -> Iterator[Subject]:
    """The model or package in ``folder``, or a model that is open already; nothing of it is loaded yet.

    Keys and values are as the package says, or in ``kv_precision``.

    Raises:
        UnsupportedModel: the model has no such form of them.
    """
    register()
    if isinstance(folder, OpenedModel):
        kv = with_kv(folder.anatomy, kv_precision or "source").kv_precision
        with folder.tensors() as tensors:
            model = stream_model(folder.config, folder.anatomy, tensors, device)
            yield Subject(model, None, folder.name, kv_precision=kv)
        return
    package = open_package(folder) if is_package(folder) else None
    manifest = None if package is None else package.manifest
    kv = kv_precision or ("source" if manifest is None else manifest.kv_precision)
    index = CheckpointIndex.open(folder) if package is None else package.index
    if manifest is not None and manifest.method != UNCHANGED:
        # Its quantization_config names the package's form, no other model.
        config = without_quantization(read_config(folder, bounds_of(index, manifest)))
        anatomy = probe(config, facts_of(index.tensors), whole=False)
        given = replace(manifest, kv_precision=with_kv(anatomy, kv).kv_precision)
        with package_subject(index, given, config, anatomy, device, str(folder)) as subject:
            yield subject
        return
    source = read_source(folder, stored_in(index), index.bytes_of)
    anatomy = with_kv(probe(source.config, source.facts), kv)
    with ShardReader(index) as reader:
        tensors = ExpandedTensors(reader, source.scheme)
        model = stream_model(source.config, anatomy, tensors, device)
        yield Subject(model, None, str(folder), kv_precision=kv)


@contextmanager
def package_subject(
    index: CheckpointIndex,
    manifest: Manifest,
    config: PretrainedConfig,
    anatomy: ModelAnatomy,
    device: torch.device,
    name: str,
) -> Iterator[Subject]:
    """A package as its manifest says, nothing of it loaded yet.

    Args:
        index: of the package's folder.
        manifest: of the package.
        config, anatomy: of the model that it was made from.
        device: where layers run.
        name: for errors.
    """
    records = {
        number: (record_name(entry.id), manifest.layouts[entry.layout])
        for number, entry in enumerate(manifest.prototypes)
    }
    closed = {layer: manifest.open_slots(layer) for layer in manifest.rerouted}
    slot_maps = SlotMap.of_manifest(manifest)
    held = record_index(index.folder, manifest)
    with ShardReader(index) as dense, ShardReader(held) as prototypes:
        model = stream_model(config, anatomy, Dequantised(dense), device)
        if sorted(model.experts) != sorted(slot_maps):
            raise PackageError(
                f"The package in {index.folder} does not match its config.json.",
                "model and manifest have routed experts in different layers",
                _AGAIN,
            )
        for layer, (_, module) in model.experts.items():
            check_records(index.folder, manifest, layer, module, part_names(module))
        size = token_size(index.folder, [module for _, module in model.experts.values()])
        constants = read_constants(index.folder / CONSTANTS_FILE, slot_maps, size)

        def tap(layer: int) -> Tap:
            rows, is_open = constants.get(layer), closed.get(layer)
            return mapped_tap(slot_maps[layer], records, prototypes, rows, device, is_open)

        kv = manifest.kv_precision
        yield Subject(model, tap, name, prototype_bytes(manifest), closed, kv_precision=kv)


def is_package(folder: Path) -> bool:
    """Whether ``fit`` wrote the folder."""
    return is_there(folder, MANIFEST_NAME)


def prototype_bytes(manifest: Manifest) -> int:
    """Bytes of all records."""
    return sum(manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes)
