"""Whole files or none: a file grows under another name, is synced, and gets its name at the end.

``write_bytes`` and ``write_json`` for small files; ``temporary_name`` and
``finish`` for writers of large ones. No torch here.

Peak memory: the data. Raises ``NoSpace`` when the disk is full, ``ConmoeError`` when it cannot be
written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.checkpoint.fs.disk import ELSEWHERE, disk_errors
from conmoe_edge.system_calls import drop_from_cache

TEMPORARY_SUFFIX = ".tmp"


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that is whole and on the disk; ``offsets`` counts from the start of the file."""

    name: str
    size: int
    sha256: str
    offsets: dict[str, int]

    def entry(self) -> dict[str, Any]:
        """What the manifest says about it."""
        return {"size": self.size, "sha256": self.sha256}


def write_bytes(path: Path, data: bytes, fix: str = ELSEWHERE) -> WrittenFile:
    """Put ``data`` where ``path`` is, or leave what was there: never half of it. ``fix`` as of ``disk_errors``."""
    with disk_errors(path, fix), temporary_name(path) as temporary:
        temporary.write_bytes(data)
        finish(temporary, path)
    return WrittenFile(path.name, len(data), hashlib.sha256(data).hexdigest(), {})


def write_json(path: Path, value: Any) -> WrittenFile:
    """``write_bytes`` of ``value`` as JSON with sorted keys: same value, same bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return write_bytes(path, text.encode())


@contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """The name under which ``path`` grows; gone again when the block fails, which also frees a disk
    that became full.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def finish(temporary: Path, path: Path) -> None:
    """Content first, then the name: a name that is there has all of its content."""
    durable.fsync_file(temporary)
    _drop_from_cache(temporary)
    durable.replace(temporary, path)


def _drop_from_cache(path: Path) -> None:
    """What was written is not needed soon; under a memory limit its pages would crowd out the
    model's.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        drop_from_cache(descriptor)
    finally:
        os.close(descriptor)
