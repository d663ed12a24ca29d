"""The tensors of a package's smaller files (constants, predictor, routing): given out only where they are exactly what
is wanted.

A package may come from anybody, and what reads these tensors goes by the addresses of their numbers. So the header is
compared with what the manifest and the model ask for, name by name, before a byte of it is read: no name is missing,
none is there beside them, and each has its number format and its shape. Then the values: numbers, not NaN or infinity.

Peak memory: the tensors. Raises ``PackageError`` that names file and tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, TensorEntry, index_files
from conmoe_edge.errors import CheckpointError, PackageError

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "Make the package again with conmoe-edge fit, or copy it again from where it came from."


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a tensor must be.

    Attributes:
        formats: the codes that its header may have (``BF16``).
        shape: its sizes; a ``range`` where a size is only bounded.
    """

    formats: tuple[str, ...]
    shape: tuple[int | range, ...]

    def takes(self, entry: TensorEntry) -> bool:
        """Whether a tensor of a header is this."""
        return (
            entry.dtype in self.formats
            and len(entry.shape) == len(self.shape)
            and all(
                size in want if isinstance(want, range) else size == want
                for size, want in zip(entry.shape, self.shape, strict=True)
            )
        )

    def __str__(self) -> str:
        sizes = [
            f"{one.start}..{one.stop - 1}" if isinstance(one, range) else str(one)
            for one in self.shape
        ]
        return f"{' or '.join(self.formats)} [{', '.join(sizes)}]"


def damaged(path: Path, why: str) -> PackageError:
    """The error for a file of a package whose content is not what its name says."""
    return PackageError(f"{path} is damaged.", why, AGAIN)


def read_exactly(path: Path, wanted: Mapping[str, Wanted]) -> dict[str, Tensor]:
    """The tensors of ``path``, on the CPU and in memory of their own.

    Raises:
        PackageError: the file is missing or damaged, holds other tensors than ``wanted``, or NaN or infinity.
    """
    index = header_of(path)
    check_exactly(path, index, wanted)
    return read_values(path, index)


def header_of(path: Path) -> CheckpointIndex:
    """The header of ``path``, sound in itself; no value is read."""
    try:
        return index_files(path.parent, [path.name])
    except CheckpointError as error:
        raise PackageError(error.what, error.why, AGAIN) from error


def check_exactly(path: Path, index: CheckpointIndex, wanted: Mapping[str, Wanted]) -> None:
    """The tensors of a header are those that are ``wanted``, and no others.

    Raises:
        PackageError: naming the first that is not.
    """
    for name in sorted(wanted.keys() | index.tensors.keys()):
        found, want = index.tensors.get(name), wanted.get(name)
        if found is None:
            raise damaged(path, f"it has no tensor {name}")
        if want is None:
            raise damaged(path, f"nothing in the package asks for its tensor {name!r:.80}")
        if not want.takes(found):
            held = f"{found.dtype} {list(found.shape)}"
            raise damaged(path, f"{name} is {held:.80}, not {want}")


def read_values(path: Path, index: CheckpointIndex) -> dict[str, Tensor]:
    """All tensors of a header that was checked.

    Raises:
        PackageError: a read fails, or there is NaN or infinity.
    """
    from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader

    try:
        with ShardReader(index, drop_cache=False) as reader:
            found = {name: reader[name][...] for name in reader}
    except CheckpointError as error:
        raise PackageError(error.what, error.why, AGAIN) from error
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise damaged(path, f"{name} holds NaN or infinity")
    return found
