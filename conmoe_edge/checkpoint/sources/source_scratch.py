"""Where the bytes of a remote model wait on this disk: a decoder layer or two at a time, never the model.

The tensors of a layer are known by the first number in their names. When one of them is asked for, all of the layer's
are fetched, neighbours in one request, and those of the next layer behind them in threads; files of layers before it
are deleted. Each run of tensors is a file that is whole or absent, so that a run that was killed fetches what is
missing and no more. What was written into the package already is named to ``written`` and not fetched with its layer.

Peak memory: one piece of 1 MiB a thread. Raises the errors of ``HubRanges``, ``NoSpace``.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import (
    TEMPORARY_SUFFIX,
    finish,
    temporary_name,
    write_json,
)
from conmoe_edge.checkpoint.fs.contained import open_inside
from conmoe_edge.checkpoint.fs.disk import disk_errors
from conmoe_edge.checkpoint.sources.hub_ranges import HubRanges
from conmoe_edge.checkpoint.tensors.tensor_index import TensorEntry, read_json_object
from conmoe_edge.errors import CheckpointError

Unit = tuple[str, int]
"""What the names of a layer's tensors begin with, and its number."""

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_TOGETHER = 4
_RUN = 64 << 20
"""Bytes after which a run of tensors ends, so that several connections share a layer."""
_WRITTEN = "written.json"
_KEPT = "kept"


def unit_of(name: str) -> Unit | None:
    """The decoder layer that a tensor belongs to; ``None`` outside the layers."""
    found = _NUMBER.search(name)
    return None if found is None else (name[: found.start()], int(found[1]))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of a weights file, and the file that it waits in."""

    path: Path
    file: str
    start: int
    stop: int

    def has(self, entry: TensorEntry) -> bool:
        inside = self.start <= entry.offset and entry.offset + entry.nbytes <= self.stop
        return entry.file == self.file and inside


class SourceScratch:
    """The scratch of one run. Use it in a ``with`` block; leaving it keeps the files for the next run.

    Args:
        folder: its own, made when it is needed.
        ranges: where bytes come from.
        tensors: the entries of the model.
        layers: decoder layers; what has a higher number (prediction of further tokens) is not fetched ahead.
    """

    def __init__(
        self, folder: Path, ranges: HubRanges, tensors: Mapping[str, TensorEntry], layers: int
    ) -> None:
        self._folder = folder
        self._ranges = ranges
        self._tensors = tensors
        self._layers = layers
        self._units: dict[Unit, list[str]] = {}
        for name in tensors:
            if (unit := unit_of(name)) is not None:
                self._units.setdefault(unit, []).append(name)
        self._by_layer = self._keep = False
        self._read_through: set[str] = set()
        self._kept: list[_Piece] = []
        self._fetched: dict[Unit, list[Future[_Piece]]] = {}
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_TOGETHER, "fetch")
        self._recover()

    def __enter__(self) -> SourceScratch:
        return self

    def __exit__(self, *gone: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def dense_first(self, *, keep: bool) -> None:
        """From now on single tensors are asked for, of all layers; with ``keep`` their bytes stay to the end."""
        self._by_layer, self._keep = False, keep

    def layer_by_layer(self) -> None:
        """From now on layers are asked for, and what has been asked for so far is not fetched with them.

        The first call of all runs of a fit notes what that is.
        """
        with disk_errors(self._folder):
            path = self._folder / _WRITTEN
            if path.is_file():
                self._read_through = set(read_json_object(path)["names"])
            else:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_json(path, {"names": sorted(self._read_through)})
        self._by_layer = True

    def drop_layers(self) -> None:
        """Delete the files of all layers."""
        self._drop(list(self._fetched))
        self._by_layer = False

    def read_into(self, entry: TensorEntry, start: int, view: memoryview) -> None:
        """Fill ``view`` with a tensor's bytes from its byte ``start`` on."""
        piece = self._piece(entry)
        if piece is None:
            if start == 0 and len(view) == entry.nbytes:
                self._read_through.add(entry.name)
            self._ranges.read_into(entry.file, entry.offset + start, view)
            return
        with os.fdopen(open_inside(piece.path.parent, piece.path.name), "rb") as file:
            file.seek(entry.offset + start - piece.start)
            got = file.readinto(view)
        if got != len(view):
            raise CheckpointError(
                f"{piece.path} is shorter than it was.",
                f"The tensor {entry.name!r} waits in it.",
                "Run the same command again with --fresh.",
            )

    def _piece(self, entry: TensorEntry) -> _Piece | None:
        """Where a tensor waits, fetched first where that is due; ``None`` where it is read through."""
        with self._lock:
            for piece in self._kept:
                if piece.has(entry):
                    return piece
            unit = unit_of(entry.name)
            if not self._by_layer:
                if not self._keep:
                    return None
                piece = self._fetch(self._folder / _KEPT, [entry])
                self._kept.append(piece)
                return piece
            if unit is None or entry.name in self._read_through:
                return None
            following = (unit[0], unit[1] + 1)
            if unit not in self._fetched or not self._ahead(following):
                self._drop([one for one in self._fetched if one not in (unit, following)])
                self._begin(unit)
                if following[1] < self._layers:
                    self._begin(following)
            coming = self._fetched[unit]
        for future in coming:
            piece = future.result()
            if piece.has(entry):
                return piece
        return None

    def _ahead(self, unit: Unit) -> bool:
        return unit in self._fetched or unit not in self._units or unit[1] >= self._layers

    def _begin(self, unit: Unit) -> None:
        """Have a layer fetched, as far as it is not there."""
        if unit in self._fetched or unit not in self._units:
            return
        wanted = [self._tensors[one] for one in self._units[unit] if one not in self._read_through]
        entries = [one for one in wanted if not any(piece.has(one) for piece in self._kept)]
        folder = self._place(unit)
        self._fetched[unit] = [
            self._pool.submit(self._fetch, folder, run) for run in _runs(entries)
        ]

    def _place(self, unit: Unit) -> Path:
        numbered = sorted({prefix for prefix, _ in self._units}).index(unit[0])
        return self._folder / f"layer-{numbered}-{unit[1]:05d}"

    def _fetch(self, folder: Path, entries: Sequence[TensorEntry]) -> _Piece:
        """Neighbours in one file, into one file here; nothing where they are there already."""
        file, start = entries[0].file, entries[0].offset
        stop = entries[-1].offset + entries[-1].nbytes
        path = folder / f"{Path(file).stem}-{start}-{stop}.part"
        if not path.is_file() or path.stat().st_size != stop - start:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with disk_errors(path), temporary_name(path) as temporary:
                with temporary.open("wb") as out:
                    for piece in self._ranges.pieces(file, start, stop, self._stop.is_set):
                        out.write(piece)
                    if out.tell() != stop - start:
                        raise InterruptedError("the run was stopped")
                finish(temporary, path)
        return _Piece(path, file, start, stop)

    def _drop(self, units: Iterable[Unit]) -> None:
        for unit in units:
            for future in self._fetched.pop(unit):
                if not future.cancel() and future.exception() is None:
                    future.result().path.unlink(missing_ok=True)
            _empty(self._place(unit))

    def _recover(self) -> None:
        """What an earlier run left: what it kept is used, what grew when it ended is thrown away."""
        if not self._folder.is_dir():
            return
        for path in self._folder.rglob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink()
        files = {Path(entry.file).stem: entry.file for entry in self._tensors.values()}
        for path in sorted((self._folder / _KEPT).glob("*.part")):
            stem, start, stop = path.stem.rsplit("-", 2)
            if stem in files and path.stat().st_size == int(stop) - int(start):
                self._kept.append(_Piece(path, files[stem], int(start), int(stop)))


def _runs(entries: Iterable[TensorEntry]) -> list[list[TensorEntry]]:
    """Neighbours in a file together, up to ``_RUN`` bytes; tensors without bytes wait in no file."""
    runs: list[list[TensorEntry]] = []
    for entry in sorted(entries, key=lambda one: (one.file, one.offset)):
        if entry.nbytes == 0:
            continue
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and last.file == entry.file
            and last.offset + last.nbytes == entry.offset
            and entry.offset + entry.nbytes - runs[-1][0].offset <= _RUN
        ):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs


def _empty(folder: Path) -> None:
    """Delete what an earlier run left of a layer, and its folder."""
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
