"""Which GGUF files a path means, and what their headers say together.

A path is one file, one part of a model that is split over several (``-00001-of-00003.gguf``), or a folder that holds
exactly one model. Raises ``CheckpointError``, ``UnsupportedModel``, ``UsageError``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.gguf.header import read_header
from conmoe_edge.checkpoint.tensors.tensor_index import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointIndex,
    ShardFile,
    TensorEntry,
)
from conmoe_edge.errors import CheckpointError, UnsupportedModel, UsageError

SUFFIX = ".gguf"
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
"""How llama.cpp names the files of a model that is split."""
_MOST_PARTS = 4096


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """The files of one model. ``path`` is its first file; the names in ``index`` are GGUF's."""

    path: Path
    metadata: Mapping[str, Any]
    index: CheckpointIndex

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return self.metadata["general.architecture"]


def names_gguf(path: Path) -> bool:
    """Whether a path that a user named is a GGUF file, or a folder with GGUF files and no other weights."""
    if path.is_dir():
        others = (path / SINGLE_FILE).exists() or (path / INDEX_FILE).exists()
        return not others and any(one.suffix == SUFFIX for one in path.iterdir())
    return path.suffix == SUFFIX and path.exists()


def files_of(path: Path) -> tuple[Path, list[str]]:
    """The folder and the names of the files that belong to the model at ``path``, in their order.

    Raises:
        UsageError: a folder with several models.
        CheckpointError: a part is missing.
    """
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if one.suffix == SUFFIX)
        first = {first_part(name) for name in names}
        if len(first) != 1:
            raise UsageError(
                f"{path} holds {len(first)} GGUF models.",
                ", ".join(sorted(first)[:4]),
                f"name one of them: {path / min(first)}",
            )
        path = path / first.pop()
    part = PART.fullmatch(path.name)
    if part is None:
        return path.parent, [path.name]
    count = int(part["count"])
    if not 0 < int(part["number"]) <= count <= _MOST_PARTS:
        raise CheckpointError(
            f"{path} has a name that cannot be.", "", "Give it back its own name."
        )
    names = [f"{part['stem']}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]
    for name in names:
        if not (path.parent / name).exists():
            raise CheckpointError(
                f"{name} is missing.",
                f"the model has {count} files, and {path.parent} does not have this one",
                "Download the other parts into the same folder.",
            )
    return path.parent, names


def first_part(name: str) -> str:
    """The name of a model's first file, from that of any of its files."""
    part = PART.fullmatch(name)
    return name if part is None else f"{part['stem']}-00001-of-{part['count']}{SUFFIX}"


def open_files(path: Path) -> GgufFiles:
    """Read and check the headers of all files of the model at ``path``.

    Raises:
        CheckpointError: a file is damaged, or they do not belong together.
        UnsupportedModel: they hold no model, or are of a kind that is not read.
        UsageError: a folder with several models.
    """
    folder, names = files_of(path)
    metadata: Mapping[str, Any] = {}
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, ShardFile] = {}
    for number, name in enumerate(names):
        header = read_header(folder, name)
        if number == 0:
            metadata = header.metadata
        _check_part(folder / name, header.metadata, number, len(names))
        files[name] = header.shard
        for entry in header.tensors:
            if entry.name in tensors:
                raise CheckpointError(
                    f"The tensor {entry.name!r} is in {tensors[entry.name].file} and in {name}.",
                    "the files belong to different models",
                    "Download all parts of the model again.",
                )
            tensors[entry.name] = entry
    first = folder / names[0]
    promised = metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors) or not tensors:
        raise CheckpointError(
            f"{first} holds {len(tensors)} tensors.",
            f"it promises {str(promised)[:20]}" if tensors else "a model has some",
            "Download all parts of the model again.",
        )
    _check_kind(first, metadata)
    index = CheckpointIndex(folder, dict(sorted(tensors.items())), files)
    return GgufFiles(first, metadata, index)


def _check_part(path: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    promised = metadata.get("split.count", 0)
    if promised in (0, 1) and count == 1:
        return
    if promised != count or metadata.get("split.no") != number:
        raise CheckpointError(
            f"{path} is not part {number + 1} of {count} of a model.",
            f"it says that it is part {_plus_one(metadata.get('split.no'))} of {str(promised)[:20]}",
            "Give the parts back their own names, or download them again.",
        )


def _plus_one(value: Any) -> Any:
    return value + 1 if type(value) is int else "?"


def _check_kind(path: Path, metadata: Mapping[str, Any]) -> None:
    kind = metadata.get("general.type", "model")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(
            f"{path} does not say what model it is.",
            "it has no general.architecture",
            "Download the file again, or convert the model again with llama.cpp.",
        )
    if kind != "model" or architecture == "clip":
        raise UnsupportedModel(
            f"{path} is no language model.",
            f"it holds {'the part of one that sees' if architecture == 'clip' else str(kind)[:40]}",
            "name the GGUF file of the model itself",
        )
