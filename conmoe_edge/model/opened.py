"""A model whose weights are on this disk, or on the hub, opened once. It is handed on in the place of its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from conmoe_edge.checkpoint.gguf.expanded import GgufTensors
from conmoe_edge.checkpoint.gguf.opened import GgufModel
from conmoe_edge.checkpoint.quantised.expanded import ExpandedTensors
from conmoe_edge.checkpoint.quantised.scheme import Scheme
from conmoe_edge.checkpoint.quantised.stored import stored_in
from conmoe_edge.checkpoint.sources.hub_ranges import HubRanges
from conmoe_edge.checkpoint.sources.locate import Source
from conmoe_edge.checkpoint.sources.remote_index import (
    remote_fingerprint,
    remote_index,
    remote_peek,
)
from conmoe_edge.checkpoint.sources.remote_reader import RemoteReader
from conmoe_edge.checkpoint.sources.source_scratch import SourceScratch
from conmoe_edge.checkpoint.tensors.fingerprint import fingerprint
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy, ShardReader
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.generation_file import read_generation
from conmoe_edge.model.other_parts import NOTHING, OtherParts
from conmoe_edge.model.probe import count_in, probe
from conmoe_edge.model.source_facts import SourceFacts, read_gguf, read_source


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checked model, no weight of it read.

    Attributes:
        name: as plans and packages call it: the hub's id, or what was asked for.
        revision: commit of a model from the hub.
        index: the checked headers of its weights.
        config, anatomy: what it is.
        identity: its fingerprint (``checkpoint/tensors/fingerprint.py``).
        scheme: how the tensors of a plain checkpoint are made from its own.
        folder: where its small files lie.
        beside: its parts for pictures and sound.
        keeps_vision: whether a package takes them along; ``anatomy`` counts them then.
        ranges: reads the weights from the hub, where they are not on this disk.
        gguf: has the weights, where they are in GGUF files.
    """

    name: str
    revision: str | None
    index: CheckpointIndex
    config: PretrainedConfig
    anatomy: ModelAnatomy
    identity: Mapping[str, Any]
    scheme: Scheme
    folder: Path
    beside: OtherParts = NOTHING
    keeps_vision: bool = False
    ranges: HubRanges | None = None
    gguf: GgufModel | None = None

    @contextmanager
    def tensors(self, scratch: SourceScratch | None = None) -> Iterator[Mapping[str, Lazy]]:
        """Its weights by the names, and in the shapes, of a plain checkpoint of this model, read when asked for.

        ``scratch`` is where bytes from the hub wait (``scratch``).
        """
        with self._bytes(scratch) as reader:
            if self.gguf is None:
                yield ExpandedTensors(reader, self.scheme)
            else:
                yield GgufTensors(reader, self.gguf.tensors)

    def _bytes(self, scratch: SourceScratch | None) -> ShardReader:
        """The tensors as the checkpoint has them."""
        if self.ranges is None:
            return ShardReader(self.index)
        return RemoteReader(self.index, self.ranges, scratch)

    @contextmanager
    def scratch(self, folder: Path) -> Iterator[SourceScratch | None]:
        """Room in ``folder`` for what is read from the hub; ``None`` where the weights are on this disk."""
        if self.ranges is None:
            yield None
            return
        layers = len(self.anatomy.layers)
        with SourceScratch(folder, self.ranges, self.index.tensors, layers) as scratch:
            yield scratch

    def to_json(self) -> dict[str, Any]:
        """What a package remembers of it."""
        return {"name": self.name, "revision": self.revision, "fingerprint": dict(self.identity)}


def open_model(source: Source, *, keep_vision: bool = False) -> OpenedModel:
    """Read and check the headers and the config; no weight is read (of small files without a digest, their ends).
    With ``keep_vision`` a package will have the parts for pictures and sound.

    Raises:
        CheckpointError: the model is damaged, or its generation config is.
        UnsupportedModel: its experts cannot be reached.
    """
    ranges, gguf = source.ranges, source.gguf
    if gguf is not None:
        index, found = gguf.index, read_gguf(gguf)
    elif ranges is None:
        index = CheckpointIndex.open(source.path)
        found = read_source(source.path, stored_in(index), index.bytes_of)
    else:
        index = remote_index(source.path, ranges)
        found = read_source(source.path, stored_in(index), remote_peek(index, ranges))
    config = found.config
    # It travels with the package, which would not open with what is refused there.
    read_generation(source.path, count_in(config.get_text_config(), "vocab_size"))
    return OpenedModel(
        name=source.hub_id or source.name,
        revision=source.revision,
        index=index,
        config=config,
        anatomy=anatomy_of(found, keep_vision=keep_vision),
        identity=(
            fingerprint(index, source.path) if ranges is None else remote_fingerprint(index, ranges)
        ),
        scheme=found.scheme,
        folder=source.path,
        beside=found.beside,
        keeps_vision=keep_vision and bool(found.beside.tensors),
        ranges=ranges,
        gguf=gguf,
    )


def anatomy_of(found: SourceFacts, *, keep_vision: bool) -> ModelAnatomy:
    """The text model in numbers. Parts for pictures and sound that a package keeps are bytes outside its layers:
    whoever loads the package with the model's own class has them in memory.

    Raises:
        UnsupportedModel, CheckpointError: as ``probe``.
    """
    anatomy = probe(found.config, found.facts)
    if not keep_vision:
        return anatomy
    return replace(anatomy, outside_bytes=anatomy.outside_bytes + found.beside.nbytes)
