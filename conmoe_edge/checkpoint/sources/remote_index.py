"""The headers of a hub model's weights, read in parts and checked as those of a folder are.

Peak memory: the headers. Raises ``CheckpointError``, ``ModelNotFound``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.sources.hub_ranges import HubRanges
from conmoe_edge.checkpoint.tensors.fingerprint import SAMPLE, identity_of
from conmoe_edge.checkpoint.tensors.tensor_index import (
    CheckpointIndex,
    ShardFile,
    TensorEntry,
    damaged_header,
    index_of,
    place_in_data,
    weights_names,
)

_FIRST = 1 << 17
"""Most headers are shorter."""
_MOST_HEADER = 100_000_000
"""The format's own limit."""
_TOGETHER = 4


def remote_index(folder: Path, ranges: HubRanges) -> CheckpointIndex:
    """The index of the model whose small files lie in ``folder``.

    Raises:
        CheckpointError: as ``CheckpointIndex.open``.
    """
    names, weight_map = weights_names(folder, remote=True)
    with ThreadPoolExecutor(_TOGETHER) as pool:
        headers = dict(
            zip(names, pool.map(lambda one: _header(folder, ranges, one), names), strict=True)
        )
    return index_of(folder, headers, weight_map)


def remote_fingerprint(index: CheckpointIndex, ranges: HubRanges) -> dict[str, Any]:
    """``fingerprint`` of the same model in the hub's cache."""
    return identity_of(
        index.folder, {name: _identity(shard, ranges) for name, shard in index.files.items()}
    )


def remote_peek(index: CheckpointIndex, ranges: HubRanges) -> Callable[[str], bytes]:
    """Reads the bytes of single tensors; for small ones."""

    def read(name: str) -> bytes:
        entry = index.tensors[name]
        return ranges.read(entry.file, entry.offset, entry.offset + entry.nbytes)

    return read


def _identity(shard: ShardFile, ranges: HubRanges) -> Mapping[str, Any]:
    file = ranges.file(shard.name)
    if file.sha256 is not None:
        return {"size": file.size, "sha256": file.sha256}
    digest = hashlib.sha256(ranges.read(shard.name, 0, min(shard.data_start + SAMPLE, shard.size)))
    digest.update(ranges.read(shard.name, max(0, shard.size - SAMPLE), shard.size))
    return {"size": file.size, "sampled": digest.hexdigest()}


def _header(folder: Path, ranges: HubRanges, name: str) -> tuple[ShardFile, list[TensorEntry]]:
    path, size = folder / name, ranges.file(name).size
    if size < 8:
        raise damaged_header(path, f"It has only {size} bytes.")
    first = ranges.read(name, 0, min(size, _FIRST))
    length = int.from_bytes(first[:8], "little")
    if length > min(_MOST_HEADER, size - 8):
        raise damaged_header(path, f"Its header would have {length} bytes.")
    text = first[8 : 8 + length]
    if len(text) < length:
        text += ranges.read(name, 8 + len(text), 8 + length)
    shard = ShardFile(name, path, size, 8 + length)
    return shard, _entries(shard, text)


def _entries(shard: ShardFile, text: bytes) -> list[TensorEntry]:
    """The tensors by offset; they fill the data section without gaps, as the format asks for."""
    try:
        table = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise damaged_header(shard.path, str(error)[:200]) from None
    if not isinstance(table, dict):
        raise damaged_header(shard.path, "Its header is no JSON object.")
    entries = []
    for name, tensor in table.items():
        if name == "__metadata__":
            continue
        if not (
            isinstance(tensor, dict)
            and isinstance(shape := tensor.get("shape"), list)
            and isinstance(offsets := tensor.get("data_offsets"), list)
        ):
            raise damaged_header(
                shard.path, f"The entry of the tensor {name!r} is of another form."
            )
        start, nbytes = place_in_data(name, str(shard.path), tensor.get("dtype"), shape, offsets)
        place = shard.data_start + start
        entries.append(TensorEntry(name, shard.name, tensor["dtype"], tuple(shape), place, nbytes))
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes, entry.name))
    end = shard.data_start
    for entry in entries:
        if entry.offset != end:
            raise damaged_header(
                shard.path, f"The place of the tensor {entry.name!r} is impossible."
            )
        end += entry.nbytes
    if end != shard.size:
        raise damaged_header(
            shard.path, f"Its tensors end at {end}, and it has {shard.size} bytes."
        )
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("Its header can be read in two ways.")
    return table
