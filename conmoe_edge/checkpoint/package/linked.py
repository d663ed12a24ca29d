"""A model that fits as it is: a folder that holds it unchanged, without a second copy of its weights where that can be.

Weights are hard-linked; where that is not possible (another disk) they are copied. Never a symbolic link: a package
that reads files outside its folder is no package. Small files are copied. Peak memory: a few MB.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_bytes
from conmoe_edge.checkpoint.fs.contained import is_there, open_inside, path_inside, read_inside
from conmoe_edge.checkpoint.fs.disk import disk_errors, require_space
from conmoe_edge.checkpoint.package.sidefiles import copy_side_files
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE, INDEX_FILE, CheckpointIndex
from conmoe_edge.errors import CheckpointError

_SMALL = 64 << 20
_CHUNK = 16 << 20


def link_model(index: CheckpointIndex, target: Path) -> list[WrittenFile]:
    """Put the model of ``index`` into ``target``; says which files were written (its weights are not among them).

    Raises:
        CheckpointError: a file of the model is not inside its folder, or cannot be read.
        NoSpace: weights that have to be copied do not fit on the disk of ``target``.
    """
    written = copy_side_files(index.folder, target)
    for name in (CONFIG_FILE, INDEX_FILE):
        if is_there(index.folder, name):
            written.append(write_bytes(target / name, read_inside(index.folder, name)))
    copied = [name for name in sorted(index.files) if not _linked(index, name, target)]
    require_space(target, sum(index.files[name].size for name in copied))
    for name in copied:
        _copy(index, name, target / name)
    return written


def _copy(index: CheckpointIndex, name: str, place: Path) -> None:
    with (
        disk_errors(place),
        os.fdopen(open_inside(index.folder, name), "rb") as source,
        place.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, _CHUNK)
        copied = file.tell()
    if copied != index.files[name].size:
        raise CheckpointError(
            f"{index.folder / name} was changed while it was copied.",
            f"It had {index.files[name].size} bytes, and {copied} came.",
            "Wait until nothing writes to the model's folder, and run the same command again.",
        )


def _linked(index: CheckpointIndex, name: str, target: Path) -> bool:
    """Whether a hard link now stands in ``target``; small files are copied, as one may want to change them."""
    place = target / name
    place.unlink(missing_ok=True)
    if index.files[name].size <= _SMALL:
        return False
    try:
        os.link(path_inside(index.folder, name), place)
    except OSError:
        return False
    return True
