"""The tensors of a checkpoint folder: where each one lies, of what type and shape. Reads headers
only, never a weight.

``CheckpointIndex.open`` checks everything before any work is done: names of shards that would
leave the folder, missing or truncated shards, headers that are damaged or contradict the file or
the index, pickled weights. The format's own library decides whether a header is sound (sizes,
overlaps, trailing bytes); its content is read through ``huggingface_hub``.

Peak memory: the headers, some tens of MB for the largest models. Raises ``CheckpointError`` and
nothing else.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from conmoe_edge.checkpoint.format.dtypes import BITS, TORCH_NAMES
from conmoe_edge.checkpoint.fs.contained import (
    is_plain_name,
    is_there,
    open_inside,
    path_inside,
    read_inside,
)
from conmoe_edge.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AGAIN = "Download the model again, or copy it again from where it came from."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: ``offset`` counts from the start of ``file``; ``dtype`` is the header's code
    (``BF16``).
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def torch_name(self) -> str:
        """``dtype`` as torch calls it (``bfloat16``); the code itself where torch has no such
        format.
        """
        return TORCH_NAMES.get(self.dtype, self.dtype)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One weights file: its ``size`` and the first byte of its data section."""

    name: str
    path: Path
    size: int
    data_start: int


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """A whole checkpoint, checked. ``tensors`` and ``files`` are sorted by name."""

    folder: Path
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, ShardFile]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def bytes_of(self, name: str) -> bytes:
        """The bytes of one tensor, for small ones that say how others are stored.

        Raises:
            CheckpointError: the file is gone, or shorter than it was.
        """
        entry = self.tensors[name]
        with os.fdopen(open_inside(self.folder, entry.file), "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.nbytes)
        if len(data) != entry.nbytes:
            raise CheckpointError(
                f"The tensor {name!r} cannot be read.",
                f"{entry.file} is shorter than it was.",
                _AGAIN,
            )
        return data

    @classmethod
    def open(cls, folder: Path) -> CheckpointIndex:
        """Read and check the headers of the checkpoint in ``folder``."""
        require_config(folder)
        names, weight_map = weights_names(folder)
        return index_of(folder, {name: read_header(folder, name) for name in names}, weight_map)


def index_of(
    folder: Path,
    headers: Mapping[str, tuple[ShardFile, list[TensorEntry]]],
    weight_map: Mapping[str, str] | None,
) -> CheckpointIndex:
    """The index of a whole checkpoint from the headers of its files, which must agree with ``weight_map``.

    Raises:
        CheckpointError: they do not, or there is no tensor.
    """
    files: dict[str, ShardFile] = {}
    tensors: dict[str, TensorEntry] = {}
    for name, (shard, entries) in headers.items():
        files[name] = shard
        for entry in entries:
            if weight_map is not None and weight_map.get(entry.name) != name:
                # The index has this tensor in another shard or not at all: which one transformers
                # loads would depend on the order.
                where = weight_map.get(entry.name, "no file at all")
                raise CheckpointError(
                    f"{name} holds the tensor {entry.name!r}, which the index has not there.",
                    f"{INDEX_FILE} says that it is in {where}.",
                    _AGAIN,
                )
            tensors[entry.name] = entry
    if weight_map is not None:
        for key in sorted(set(weight_map) - set(tensors)):
            raise CheckpointError(
                f"The tensor {key!r} is missing from {weight_map[key]}.",
                f"{INDEX_FILE} says that it is there.",
                _AGAIN,
            )
    if not tensors:
        raise CheckpointError(
            f"{folder} holds no weights.", "Its weight files name no tensor.", _AGAIN
        )
    return CheckpointIndex(folder, dict(sorted(tensors.items())), files)


def weights_names(
    folder: Path, *, remote: bool = False
) -> tuple[list[str], Mapping[str, str] | None]:
    """The weights files of a checkpoint, and tensor -> file where an index file says that.

    ``remote`` where the weights are not in the folder: then there is one ``model.safetensors`` unless an index says
    something else.

    Raises:
        CheckpointError: there are none, or the index is damaged.
    """
    if remote and not is_there(folder, INDEX_FILE):
        return [SINGLE_FILE], None
    weight_map = _weight_map(folder)
    return ([SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))), weight_map


def damaged_header(path: Path, why: str) -> CheckpointError:
    """The error for a header that cannot be."""
    return CheckpointError(f"{path} is damaged.", why, _AGAIN)


def index_files(folder: Path, names: Sequence[str]) -> CheckpointIndex:
    """The tensors of single weights files of ``folder``, which need be no whole checkpoint.

    Raises:
        CheckpointError: as ``read_header``.
    """
    headers = [read_header(folder, name) for name in names]
    tensors = {entry.name: entry for _, entries in headers for entry in entries}
    return CheckpointIndex(folder, tensors, {shard.name: shard for shard, _ in headers})


def require_config(folder: Path) -> bytes:
    """The bytes of ``config.json``, which must be a JSON object.

    Raises:
        CheckpointError: there is no such folder or file, or it is no JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder.",
            "",
            "Give the folder that holds config.json and the weights.",
        )
    data = read_inside(folder, CONFIG_FILE) if is_there(folder, CONFIG_FILE) else b""
    _json_object(folder / CONFIG_FILE, data)
    return data


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model that must hold an object.

    Raises:
        CheckpointError: missing, outside its folder, not a plain file, too large, not UTF-8, not JSON, not an object.
    """
    data = read_inside(path.parent, path.name) if is_there(path.parent, path.name) else b""
    return _json_object(path, data)


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    if not data and not is_there(path.parent, path.name):
        raise CheckpointError(
            f"{path.parent} has no {path.name}.",
            "A model folder holds config.json, a tokenizer and *.safetensors files.",
            "Give the folder of a model in the Hugging Face layout.",
        )
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged.", _reason(error), _AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged.", "It holds no JSON object.", _AGAIN)
    return value


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard from the index file; ``None`` where there is one ``model.safetensors``
    and no index.
    """
    path = folder / INDEX_FILE
    if not path.is_file() and not path.is_symlink():
        if (folder / SINGLE_FILE).exists():
            return None
        raise _no_weights(folder)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is damaged.", "It has no weight_map.", _AGAIN)
    sound: set[str] = set()
    for key, shard in weight_map.items():
        if isinstance(shard, str) and shard in sound:
            continue  # a hundred thousand tensors lie in a hundred files
        if isinstance(shard, str) and is_plain_name(shard) and shard.endswith(".safetensors"):
            sound.add(shard)
        else:
            raise CheckpointError(
                f"{INDEX_FILE} puts the tensor {key!r} into {shard!r}.",
                "A shard must be the plain name of a *.safetensors file in the model's own folder.",
                "Do not use this copy of the model: get it from its publisher.",
            )
    return weight_map


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        return CheckpointError(
            f"{folder} holds only pickled weights ({pickled[0]}).",
            "A pickle can run any program when it is opened, so it is never opened here.",
            "Convert it to safetensors where you trust it: load it with transformers and call "
            "save_pretrained(folder), or take a revision of the model that has *.safetensors.",
        )
    return CheckpointError(
        f"{folder} holds no weights.",
        f"Neither {INDEX_FILE} nor {SINGLE_FILE} is there.",
        "Give the folder of a model in safetensors format, or its name on the hub.",
    )


def read_header(folder: Path, name: str) -> tuple[ShardFile, list[TensorEntry]]:
    """Check the file ``name`` of ``folder`` and list its tensors by offset.

    Raises:
        CheckpointError: missing, outside the folder, not a plain file, truncated, damaged.
    """
    path = folder / name
    if not is_there(folder, name):
        raise CheckpointError(
            f"The shard {name} is missing.", f"{folder} does not have it.", _AGAIN
        )
    try:
        # Before anything opens it: opening a named pipe would wait for ever.
        real = path_inside(folder, name)
        info = real.stat()
        if info.st_size < 8:
            raise CheckpointError(
                f"{path} is damaged.", f"It has only {info.st_size} bytes.", _AGAIN
            )
        # numpy, because the header alone is wanted and torch need not be there.
        with safe_open(real, framework="np") as handle:
            keys = set(handle.keys())
        header = parse_local_safetensors_file_metadata(real)
        with os.fdopen(open_inside(folder, name), "rb") as file:
            data_start = 8 + struct.unpack("<Q", file.read(8))[0]
    except (
        SafetensorError,
        SafetensorsParsingError,
        AttributeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise CheckpointError(f"{path} is damaged.", _reason(error), _AGAIN) from None
    except (OSError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read.", _reason(error), _AGAIN) from None
    shard = ShardFile(name, path, info.st_size, data_start)
    entries = [
        _entry(shard, key, tensor.dtype, tensor.shape, tensor.data_offsets)
        for key, tensor in header.tensors.items()
    ]
    if {entry.name for entry in entries} != keys:
        raise CheckpointError(f"{path} is damaged.", "Its header can be read in two ways.", _AGAIN)
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes, entry.name))
    return shard, entries


def _entry(shard: ShardFile, name: str, dtype: str, shape: Any, offsets: Any) -> TensorEntry:
    """One tensor of a header, checked once more by arithmetic of our own: reads will go to exactly
    these bytes.
    """
    start, nbytes = place_in_data(name, str(shard.path), dtype, shape, offsets)
    if start + nbytes > shard.size - shard.data_start:
        raise _impossible(name, str(shard.path))
    return TensorEntry(name, shard.name, dtype, tuple(shape), shard.data_start + start, nbytes)


def place_in_data(name: str, where: str, dtype: Any, shape: Any, offsets: Any) -> tuple[int, int]:
    """Start in the data section and size of a tensor, from its header, if they make sense.

    ``where`` is the file, or the model on the hub, that messages name.

    Raises:
        CheckpointError: an unknown number format, or a size that is not that of the shape.
    """
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(
            f"The tensor {name!r} in {where} is stored as {dtype}.",
            "This number format is not known here.",
            "Use the checkpoint in bf16, fp16 or fp32.",
        )
    numbers = [*shape, *offsets]
    if len(offsets) != 2 or any(type(number) is not int or number < 0 for number in numbers):
        raise _impossible(name, where)
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * bits:
        raise _impossible(name, where)
    return start, end - start


def _impossible(name: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is damaged.", f"The place of the tensor {name!r} is impossible.", _AGAIN
    )


def _reason(error: BaseException) -> str:
    """The first line of a library's message, short enough for one line on a screen."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
