"""A model that fits as it is: a folder that holds it unchanged, without a second copy of its weights.

Weights are hard-linked; where that is not possible (another disk) they are linked symbolically, and where that is not
possible either they are copied. Small files are copied. Peak memory: a few MB.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_bytes
from conmoe_edge.checkpoint.package.sidefiles import copy_side_files
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE, INDEX_FILE, CheckpointIndex

_SMALL = 64 << 20


def link_model(index: CheckpointIndex, target: Path) -> list[WrittenFile]:
    """Put the model of ``index`` into ``target``; says which files were written (linked weights are not among them)."""
    written = copy_side_files(index.folder, target)
    for name in (CONFIG_FILE, INDEX_FILE):
        source = index.folder / name
        if source.is_file():
            written.append(write_bytes(target / name, source.read_bytes()))
    for name, shard in sorted(index.files.items()):
        _link(shard.path.resolve(), target / name)
    return written


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    if source.stat().st_size <= _SMALL:
        shutil.copyfile(source, target)
        return
    for link in (os.link, os.symlink):
        try:
            link(source, target)
        except OSError:
            continue
        return
    shutil.copyfile(source, target)
