"""``constants.safetensors``: what a router slot adds in place of, or beside, a prototype's output.

One tensor ``constants.<layer>`` [n, H] in bf16 (fp32 in older packages) for every layer that has any;
``SlotRecord.constant`` is a row of it. Constants are means over tokens: what bf16 leaves out of them is far below what
they are off. Peak memory: the file in fp32. Raises ``PackageError`` for a file that is not what the map asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import CONSTANTS_FILE
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.checkpoint.package.small_tensors import Wanted, read_exactly
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors

__all__ = ["CONSTANTS_FILE", "read_constants", "read_rows", "write_constants"]

_PREFIX = "constants."
_FORMATS = ("BF16", "F32")
_ANY_WIDTH = range(1, 1 << 24)
_ANY_COUNT = range(1, 1 << 16)


def write_constants(path: Path, constants: Mapping[int, Tensor]) -> WrittenFile:
    """Write [n, H] of every layer, in bf16."""
    return write_tensors(
        path,
        [
            TensorSource(
                f"{_PREFIX}{layer}", "bfloat16", tuple(rows.shape), lambda r=rows: r.bfloat16()
            )
            for layer, rows in sorted(constants.items())
        ],
    )


def read_constants(
    path: Path, maps: Mapping[int, SlotMap], hidden: int | None = None
) -> dict[int, Tensor]:
    """Layer -> [n, H] fp32, for the layers of ``maps`` whose slots have constants; no file is asked for where none has.

    Args:
        path: the file.
        maps: decoder layer -> its map, which says how many rows there are.
        hidden: H of the model; ``None`` where the caller does not know it.

    Raises:
        PackageError: it has other tensors, another number of rows, another width or format, or NaN or infinity.
    """
    rows = {layer: one.constant_rows for layer, one in maps.items() if one.has_constants}
    if not rows:
        return {}
    width = _ANY_WIDTH if hidden is None else hidden
    found = read_exactly(
        path, {f"{_PREFIX}{layer}": Wanted(_FORMATS, (n, width)) for layer, n in rows.items()}
    )
    return {layer: found[f"{_PREFIX}{layer}"].float() for layer in rows}


def read_rows(path: Path, layer: int) -> Tensor:
    """[n, H] fp32 of a file with the constants of one ``layer``; raises as ``read_constants``."""
    name = f"{_PREFIX}{layer}"
    return read_exactly(path, {name: Wanted(_FORMATS, (_ANY_COUNT, _ANY_WIDTH))})[name].float()
