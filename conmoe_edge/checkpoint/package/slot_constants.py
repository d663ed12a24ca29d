"""``constants.safetensors``: what a router slot adds in place of, or beside, a prototype's output.

One tensor ``constants.<layer>`` [n, H] in fp32 for every layer that has any; ``SlotRecord.constant``
is a row of it. Peak memory: the file. Raises ``PackageError`` for a file that cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import CONSTANTS_FILE
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.checkpoint.fs.contained import path_inside
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors
from conmoe_edge.errors import CheckpointError, PackageError

__all__ = ["CONSTANTS_FILE", "read_constants", "write_constants"]

_PREFIX = "constants."


def write_constants(path: Path, constants: Mapping[int, Tensor]) -> WrittenFile:
    """Write [n, H] of every layer, in fp32."""
    return write_tensors(
        path,
        [
            TensorSource(
                f"{_PREFIX}{layer}", "float32", tuple(rows.shape), lambda r=rows: r.float()
            )
            for layer, rows in sorted(constants.items())
        ],
    )


def read_constants(path: Path) -> dict[int, Tensor]:
    """Layer -> [n, H] fp32."""
    try:
        tensors = load_file(path_inside(path.parent, path.name))
    except (OSError, SafetensorError, CheckpointError) as error:
        raise PackageError(
            f"The constants in {path} cannot be read.",
            str(error)[:200],
            "Write the package again: conmoe-edge fit MODEL --out DIR --overwrite",
        ) from error
    return {
        int(name.removeprefix(_PREFIX)): rows.float().clone()
        for name, rows in tensors.items()
        if name.removeprefix(_PREFIX).isdecimal()
    }
