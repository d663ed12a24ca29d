"""A folder that is whole or absent: built beside its place, renamed onto it at the end.

For a target ``out`` the parent folder holds meanwhile

- ``.out.partial-<id>/package``: what ``out`` will be; ``<id>`` is a hash of the settings, so the
  same command finds it again
- ``.out.partial-<id>/work``: what only the run needs (journal, hidden states); never part of
  ``out``
- ``.out.partial-<id>/settings.json``: the settings themselves, to say which one differs
- ``.out.lock``: who is working on it
- ``.out.old-<id>``: the former ``out`` during a commit with ``overwrite``; put back when a commit
  was cut short

Raises ``OutputExists``, ``InUse``, ``ResumeMismatch``, ``NoSpace``; ``ConmoeError`` where the
parent cannot be written; ``UsageError`` where the path is too long for Windows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME
from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.checkpoint.fs.atomic_files import TEMPORARY_SUFFIX, write_json
from conmoe_edge.checkpoint.fs.disk import disk_errors
from conmoe_edge.checkpoint.fs.path_limits import check_length
from conmoe_edge.checkpoint.tensors.fingerprint import settings_fingerprint
from conmoe_edge.checkpoint.tensors.tensor_index import read_json_object
from conmoe_edge.errors import ConmoeError, InUse, OutputExists, ResumeMismatch, UsageError

_SETTINGS = "settings.json"
_NAME_ANOTHER = "Name a new folder with --out."


class StagedFolder:
    """One run's hold on one output folder. Use it in a ``with`` block; leaving it without
    ``commit`` keeps the work.

    Args:
        target: the folder that is wanted.
        settings: everything that decides the result, as plain JSON values; another run with the
            same goes on here.
        overwrite: an existing target may be replaced, if it is a package (or empty).
        fresh: throw away what an earlier run left instead of going on with it.
        marker: the file by which a folder is known as one that this may replace.

    Attributes:
        path: the folder in which the package is built.
        work: the folder for what only the run needs.
        resumed: whether an earlier run with the same settings left something.
    """

    def __init__(
        self,
        target: Path,
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        fresh: bool = False,
        marker: str = MANIFEST_NAME,
    ) -> None:
        try:
            self.target = target.expanduser().resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{target} cannot be an output folder.", str(error), _NAME_ANOTHER
            ) from error
        if not self.target.name:
            raise UsageError(f"{target} cannot be an output folder.", "", _NAME_ANOTHER)
        self._settings = dict(settings)
        self._overwrite = overwrite
        self._fresh = fresh
        self._marker = marker
        self._id = settings_fingerprint(self._settings)[:12]
        self._partial = self._sibling(f"partial-{self._id}")
        self._old = self._sibling(f"old-{self._id}")
        self.path = self._partial / "package"
        self.work = self._partial / "work"
        self.resumed = False
        check_length(self.path)
        self._lock = FileLock(self._sibling("lock"), timeout=0)

    def __enter__(self) -> StagedFolder:
        with disk_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self._recover()
                self._check_target()
                self._open()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def commit(self) -> None:
        """Put the package in its place. Afterwards ``path`` and ``work`` are gone."""
        with disk_errors(self.target):
            for folder, _, names in os.walk(self.path):
                for name in sorted(names):
                    file = Path(folder, name)
                    if name.endswith(TEMPORARY_SUFFIX):
                        file.unlink()
                    else:
                        durable.fsync_file(file)
                durable.fsync_folder(Path(folder))
            self._check_target()
            replaced = self.target.exists()
            if replaced:
                durable.replace(self.target, self._old)
            durable.replace(self.path, self.target)
            if replaced:
                _remove(self._old, self._marker)
            _remove(self._partial, _SETTINGS)

    def discard(self) -> None:
        """Throw the unfinished work away."""
        with disk_errors(self.target):
            if self._partial.exists():
                _remove(self._partial, _SETTINGS)

    def _sibling(self, suffix: str) -> Path:
        return self.target.with_name(f".{self.target.name}.{suffix}")

    def _siblings(self, kind: str) -> list[Path]:
        # No glob: the target's name may contain characters that mean something there.
        prefix = f".{self.target.name}.{kind}-"
        return sorted(path for path in self.target.parent.iterdir() if path.name.startswith(prefix))

    def _acquire(self) -> None:
        path = Path(self._lock.lock_file)
        try:
            self._lock.acquire()
        except Timeout:
            owner = ""
            with suppress(OSError, ValueError):
                owner = path.read_text(encoding="ascii").strip()
            raise InUse(
                f"{self.target} is being written by another process.",
                f"It has the process id {owner}." if owner.isdigit() else "",
                "Wait until it is done, or choose another folder with --out.",
            ) from None
        with suppress(OSError):
            path.write_text(f"{os.getpid()}\n", encoding="ascii")

    def _release(self) -> None:
        if self._lock.is_locked:
            # While it is held: another process that opened the old file meanwhile sees that its name
            # is gone, and tries again.
            with suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _recover(self) -> None:
        """Finish or undo what a commit that was cut short left behind."""
        for old in self._siblings("old"):
            if self.target.exists() or not _replaceable(old, self._marker):
                _remove(old, self._marker)
            else:
                durable.replace(old, self.target)
        for partial in self._siblings("partial"):
            if not (partial / _SETTINGS).is_file() or not (partial / "package").is_dir():
                _remove(partial, _SETTINGS)

    def _check_target(self) -> None:
        if not self.target.exists():
            return
        if not self._overwrite:
            raise OutputExists(
                f"{self.target} exists already.",
                "",
                "Add --overwrite to replace it, or choose another --out.",
            )
        # An --out that was mistyped must not cost documents.
        if not _replaceable(self.target, self._marker):
            raise OutputExists(
                f"{self.target} exists and is no package of conmoe-edge.",
                "Even with --overwrite only such a package, or an empty folder, is replaced.",
                "Choose another folder with --out, or remove this one yourself.",
            )

    def _open(self) -> None:
        others = [path for path in self._siblings("partial") if path != self._partial]
        if self._fresh:
            for path in self._siblings("partial"):
                _remove(path, _SETTINGS)
        elif others and not self._partial.exists():
            raise self._mismatch(others[0])
        self.resumed = self._partial.exists()
        if not self.resumed:
            self.work.mkdir(parents=True)
            write_json(self._partial / _SETTINGS, self._settings)
            # Last, because a partial folder counts only when it has a package.
            self.path.mkdir()
            durable.fsync_folder(self._partial)
            durable.fsync_folder(self._partial.parent)

    def _mismatch(self, other: Path) -> ConmoeError:
        before = _flat(read_json_object(other / _SETTINGS))
        now = _flat(self._settings)
        changes = [
            f"{name} was {before.get(name, 'not set')}, now {now.get(name, 'not set')}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        shown = "; ".join(changes[:4]) + (
            f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
        )
        return ResumeMismatch(
            f"An unfinished run for {self.target} has other settings.",
            shown,
            "Repeat the earlier command to finish it, or add --fresh to start over.",
        )


def _replaceable(folder: Path, marker: str) -> bool:
    """Whether this is a package (or what else has the marker), or an empty folder."""
    return folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))


def _remove(folder: Path, marker: str) -> None:
    """Delete a folder, first the file without which it counts for nothing: half a folder is never
    taken for a whole.
    """
    (folder / marker).unlink(missing_ok=True)
    durable.fsync_folder(folder)
    durable.remove_tree(folder)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"plan.rate": "0.25"}``, to be compared and shown one by one."""
    if isinstance(value, Mapping):
        return {
            key: text
            for name, inner in value.items()
            for key, text in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    text = str(value)
    return {prefix: text if len(text) <= 60 else f"{text[:24]}…{text[-8:]}"}
