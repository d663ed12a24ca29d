"""Tensors that wait in a run's work folder: written so that they are whole or absent, read back as they were.

Memory: what is written is not copied; what is read is mapped. Raises ``NoSpace``; ``CheckpointError``
where a file of an earlier run is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors
from conmoe_edge.errors import CheckpointError


def save_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """Keep tensors by name."""
    write_tensors(
        path,
        [
            TensorSource(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), lambda t=t: t)
            for name, t in sorted(named.items())
        ],
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What ``save_tensors`` kept; mapped, not read at once."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> CheckpointError:
    """A file of the unfinished run cannot be used."""
    return CheckpointError(
        f"{path.name} of the unfinished run is damaged.", why[:200], "start over with --fresh"
    )
