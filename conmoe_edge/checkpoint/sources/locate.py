"""From the name that a user typed to a folder with a model in it, or to its headers alone.

``locate`` gives a complete local folder, downloading it where that is needed and allowed.
``find`` does the same without the weights of a model on the hub that is not in the cache: those are read part by part.
``describe`` gives what a plan needs, ``config.json`` and the shape of every tensor, without
downloading any weight.

Raises ``ModelNotFound`` (unknown name, not on the hub, no network), ``CheckpointError`` (found but
damaged), ``UsageError``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.format.dtypes import TORCH_NAMES
from conmoe_edge.checkpoint.gguf.opened import GgufModel, open_gguf
from conmoe_edge.checkpoint.sources import hub
from conmoe_edge.checkpoint.sources.hub_ranges import HubRanges
from conmoe_edge.checkpoint.sources.hub_reach import connection_problem
from conmoe_edge.checkpoint.sources.model_names import (
    Kind,
    Meaning,
    aliases,
    config_folder,
    resolve,
)
from conmoe_edge.checkpoint.tensors.folder_check import check_folder
from conmoe_edge.checkpoint.tensors.tensor_index import (
    CheckpointIndex,
    place_in_data,
    require_config,
)

__all__ = [
    "Description",
    "Header",
    "Source",
    "aliases",
    "config_folder",
    "describe",
    "find",
    "locate",
]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is: ``name`` as it was asked for, ``path`` a local folder with all of it, or with all but the
    weights where ``ranges`` reads those from the hub, or ``gguf`` has them.

    ``revision`` is the commit where it came from the hub, and ``None`` for a folder.
    """

    name: str
    kind: Kind
    path: Path
    revision: str | None = None
    hub_id: str | None = None
    ranges: HubRanges | None = None
    gguf: GgufModel | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says of one tensor; ``dtype`` is torch's name (``bfloat16``)."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


@dataclass(frozen=True, slots=True)
class Description:
    """A model before any download of weights: ``path`` holds at least ``config.json``.

    ``peek`` reads the bytes of a tensor, for small ones that say how others are stored. ``index`` is ``None`` where the
    weights are not on this disk. With ``gguf``, ``tensors`` are those of its files.
    """

    name: str
    kind: Kind
    path: Path
    revision: str | None
    hub_id: str | None
    tensors: Mapping[str, Header]
    peek: Callable[[str], bytes]
    index: CheckpointIndex | None = None
    gguf: GgufModel | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.tensors.values())


def locate(
    model: str, *, revision: str | None = None, offline: bool = False, tqdm_class: Any = None
) -> Source:
    """The local folder of ``model``.

    Args:
        model: a folder, an alias, or a hub id (``org/name`` or ``org/name@revision``).
        revision: branch, tag or commit on the hub.
        offline: open no socket; ``HF_HUB_OFFLINE=1`` means the same.
        tqdm_class: the progress bar of the download, if there is one.
    """
    meaning = resolve(model, revision)
    if meaning.gguf is not None:
        gguf = open_gguf(meaning.gguf)
        return Source(model, meaning.kind, gguf.folder, gguf=gguf)
    if meaning.folder is not None:
        require_config(meaning.folder)
        check_folder(meaning.folder)
        return Source(model, meaning.kind, meaning.folder)
    assert meaning.hub_id is not None
    folder = hub.fetch_snapshot(
        meaning.hub_id, meaning.revision, offline=hub.is_offline(offline), tqdm_class=tqdm_class
    )
    check_folder(folder)
    return Source(model, meaning.kind, folder, _commit(folder), meaning.hub_id)


def find(model: str, *, revision: str | None = None, offline: bool = False) -> Source:
    """``locate`` without fetching any weight: of a model on the hub that is not whole in the cache, the small files.

    Arguments as for ``locate``.
    """
    meaning = resolve(model, revision)
    if meaning.hub_id is None or hub.is_offline(offline) or connection_problem():
        return locate(model, revision=revision, offline=offline)
    folder = hub.fetch_small_files(meaning.hub_id, meaning.revision)
    hub.require_config_on_hub(folder, meaning.hub_id, meaning.revision)
    require_config(folder)
    check_folder(folder)
    commit = _commit(folder)
    if hub.is_whole(folder) or commit is None:
        return locate(model, revision=commit or meaning.revision)
    ranges = HubRanges(meaning.hub_id, commit)
    return Source(model, meaning.kind, folder, commit, meaning.hub_id, ranges)


def describe(model: str, *, revision: str | None = None, offline: bool = False) -> Description:
    """The config and the tensor shapes of ``model``, with no weight read or downloaded. Arguments
    as for ``locate``.
    """
    meaning = resolve(model, revision)
    if meaning.hub_id is None or hub.is_offline(offline) or connection_problem():
        source = locate(model, revision=revision, offline=offline)
        return _local(meaning, source)
    folder = hub.fetch_config(meaning.hub_id, meaning.revision)
    require_config(folder)
    check_folder(folder)
    if hub.is_whole(folder):
        return _local(meaning, Source(model, meaning.kind, folder, _commit(folder)))
    # The commit of the config, so that config and headers cannot come from two states of the
    # repository.
    commit = _commit(folder) or meaning.revision
    headers = hub.fetch_headers(meaning.hub_id, commit)
    tensors, starts = {}, {}
    for name, (file, tensor) in headers.items():
        start, nbytes = place_in_data(name, model, tensor.dtype, tensor.shape, tensor.data_offsets)
        dtype = TORCH_NAMES.get(tensor.dtype, str(tensor.dtype))
        tensors[name] = Header(dtype, tuple(tensor.shape), nbytes, file)
        starts[name] = start
    hub_id = meaning.hub_id

    def peek(name: str) -> bytes:
        one, ranges = tensors[name], HubRanges(hub_id, commit or "main")
        data = 8 + int.from_bytes(ranges.read(one.file, 0, 8), "little")
        return ranges.read(one.file, data + starts[name], data + starts[name] + one.nbytes)

    return Description(model, meaning.kind, folder, commit, hub_id, tensors, peek)


def _local(meaning: Meaning, source: Source) -> Description:
    gguf, folder = source.gguf, source.path
    index = CheckpointIndex.open(folder) if gguf is None else gguf.index
    tensors = {
        name: Header(entry.torch_name, entry.shape, entry.nbytes, entry.file)
        for name, entry in index.tensors.items()
    }
    return Description(
        name=meaning.name,
        kind=meaning.kind,
        path=folder,
        revision=source.revision,
        hub_id=meaning.hub_id,
        tensors=tensors,
        peek=index.bytes_of,
        index=index,
        gguf=gguf,
    )


def _commit(folder: Path) -> str | None:
    """The hub's cache names a snapshot folder after its commit."""
    return folder.name if folder.parent.name == "snapshots" else None
