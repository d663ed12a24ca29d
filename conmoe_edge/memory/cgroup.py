"""The memory limit that a control group (container, service, batch job) puts on this process.
Linux; else nothing.

A group is bound by the tightest of its own and its parents' limits, so the walk goes from the
process's own group up to the mount point. Page cache is charged to the group but gives way when
memory is short, so it does not count as used. Version 1 (``memory.limit_in_bytes``) and version 2
(``memory.max``) are read, also where both are mounted side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Version 1 has no word for "no limit": it reports the largest multiple of a page, near 2**63.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest limit and what is left below it, both in bytes."""

    limit: int
    available: int


def cgroup_memory(root: Path = Path("/")) -> CgroupMemory | None:
    """The limit around this process, ``None`` if there is none; tests give another ``root``."""
    found: list[CgroupMemory] = []
    for folder, version in _groups(root):
        limit = _number(folder / ("memory.limit_in_bytes" if version == 1 else "memory.max"))
        if limit is None or limit >= _NO_LIMIT:
            continue
        used = (
            _number(folder / ("memory.usage_in_bytes" if version == 1 else "memory.current")) or 0
        )
        held = max(0, used - _page_cache(folder / "memory.stat", version))
        found.append(CgroupMemory(limit, max(0, limit - held)))
    if not found:
        return None
    return CgroupMemory(min(one.limit for one in found), min(one.available for one in found))


def _groups(root: Path) -> Iterator[tuple[Path, int]]:
    """The folders of the process's own memory groups and of all their parents, with the version."""
    mounts = _mounts(root)
    for line in _lines(root / "proc/self/cgroup"):
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        version = 2 if fields[1] == "" else 1
        if (version == 1 and "memory" not in fields[1].split(",")) or version not in mounts:
            continue
        seen_root, mount = mounts[version]
        path = Path(fields[2])
        # Inside a container the path may be the host's while only a part of the tree is mounted.
        relative = (
            path.relative_to(seen_root) if path.is_relative_to(seen_root) else path.relative_to("/")
        )
        top = root / mount.relative_to("/")
        folder = top / relative
        if ".." in relative.parts or not folder.is_dir():
            folder = top
        yield folder, version
        while folder != top:
            folder = folder.parent
            yield folder, version


def _mounts(root: Path) -> dict[int, tuple[Path, Path]]:
    """Version -> (root of the tree that is seen, mount point) of the memory controller."""
    mounts: dict[int, tuple[Path, Path]] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        seen_root, mount = Path(_unescape(fields[3])), Path(_unescape(fields[4]))
        if kind[0] == "cgroup2":
            mounts.setdefault(2, (seen_root, mount))
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            mounts.setdefault(1, (seen_root, mount))
    return mounts


def _page_cache(stat: Path, version: int) -> int:
    """Bytes of file pages in the group."""
    prefix = "total_" if version == 1 else ""
    names = {f"{prefix}inactive_file", f"{prefix}active_file"}
    total = 0
    for line in _lines(stat):
        name, _, value = line.partition(" ")
        if name in names and value.strip().isdigit():
            total += int(value)
    return total


def _number(path: Path) -> int | None:
    """The number in a file; ``None`` for ``max``, anything else, or no file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescape(field: str) -> str:
    """mountinfo writes blanks as ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)
