"""A GGUF model, opened: its headers checked, its small files written, none of its weights read."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from conmoe_edge.checkpoint.gguf.files import open_files
from conmoe_edge.checkpoint.gguf.logical import GgufLogical, config_of, family_of, logical_tensors
from conmoe_edge.checkpoint.gguf.small_files import write_small_files
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex


@dataclass(frozen=True, slots=True)
class GgufModel:
    """Attributes:
    path: its first file.
    index: the tensors of its files, under GGUF's names.
    tensors: those of the plain checkpoint, made of them.
    no_tokenizer: why there is none, as half a sentence; empty where there is one.
    """

    path: Path
    index: CheckpointIndex
    tensors: Mapping[str, GgufLogical]
    no_tokenizer: str
    _made: _Folder

    @property
    def folder(self) -> Path:
        """Where its config and its tokenizer lie, while this object lives."""
        return self._made.path


class _Folder:
    """A temporary folder that goes with this object, at the end of the program at the latest."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="conmoe-gguf-"))
        self._end = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def open_gguf(path: Path) -> GgufModel:
    """The model at ``path``: a file, one of several parts, or a folder with exactly one model.

    Raises:
        CheckpointError: damaged.
        UnsupportedModel: of a kind that is not read.
        UsageError: a folder with several models.
    """
    files = open_files(path)
    family = family_of(files)
    config = config_of(files, family)
    tensors = logical_tensors(files, family, config)
    made = _Folder()
    why = write_small_files(made.path, files, config)
    return GgufModel(files.path, files.index, tensors, why, made)
