"""The work folder of a run: what waits in it between layers, until the package is whole.

Tensors are written so that a file is whole or absent, and read back as they were: what is written is not copied, what
is read is mapped. Raises ``NoSpace``; ``CheckpointError`` where a file of an earlier run is damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors
from conmoe_edge.errors import CheckpointError

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """The names of its files: one a layer for everything that waits until the layer's scope is decided."""

    path: Path

    def experts(self, layer: int) -> Path:
        """Pretrained experts as records (``ScratchLayer``)."""
        return self._file("experts", layer)

    def sample(self, layer: int) -> Path:
        """Hidden rows for a mixed precision (``RowSample``)."""
        return self._file("sample", layer)

    def tokens(self, layer: int) -> Path:
        """``LayerTokens``."""
        return self._file("tokens", layer)

    def vectors(self, layer: int) -> Path:
        """``OutputVectors``."""
        return self._file("vectors", layer)

    def constants(self, layer: int) -> Path:
        """Constants of the layer's router slots, until all layers are decided."""
        return self._file("constants", layer)

    def drop_scope(self, layers: Sequence[int]) -> None:
        """Delete what was kept for a scope that is decided; its constants stay."""
        for layer in layers:
            for file in (self.experts, self.sample, self.tokens, self.vectors):
                file(layer).unlink(missing_ok=True)

    def save_hidden(self, phase: str, layer: int, hidden: Mapping[str, Tensor]) -> None:
        """Keep the hidden states that enter ``layer``."""
        save_tensors(self._hidden(phase, layer), hidden)

    def load_hidden(self, phase: str, layer: int) -> dict[str, Tensor]:
        """Bring them back; copies, so that no memory map of a file that will be deleted stays behind."""
        found = load_tensors(self._hidden(phase, layer))
        return {name: tensor.clone() for name, tensor in found.items()}

    def drop_hidden(self, phase: str, layer: int) -> None:
        """Delete them."""
        self._hidden(phase, layer).unlink(missing_ok=True)

    def _hidden(self, phase: str, layer: int) -> Path:
        return self.path / f"hidden-{phase}-{layer}.safetensors"

    def _file(self, kind: str, layer: int) -> Path:
        return self.path / f"{kind}-{layer:05d}.safetensors"


def save_tensors(path: Path, named: Mapping[str, Tensor]) -> WrittenFile:
    """Write tensors by name, in the order given (``write_tensors``)."""
    return write_tensors(
        path,
        [
            TensorSource(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), lambda t=t: t)
            for name, t in named.items()
        ],
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What ``save_tensors`` kept."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def load_as(kind: Callable[..., Loaded], path: Path) -> Loaded:
    """A value whose fields ``save_tensors`` kept by name."""
    try:
        return kind(**load_tensors(path))
    except TypeError as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> CheckpointError:
    """A file of the unfinished run cannot be used."""
    return CheckpointError(
        f"{path.name} of the unfinished run is damaged.", why[:200], "start over with --fresh"
    )
