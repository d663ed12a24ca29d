"""Records from disk: one record is one positioned read into memory that is already there.

``RecordStore`` opens the prototype files of a package once and reads whole records into buffers that the caller owns (a
cache slot on a CPU, a staging buffer for a GPU). Peak memory: nothing beside those buffers, but for 264 KiB for each
thread that reads small records directly. Safe to call from several threads. Raises ``PackageError`` for a missing,
short or unreadable file, and for a record that cannot be computed with.

There are two ways to read, with the same bytes as the result:

- *buffered*, through the page cache of the system, which works as a tier of its own: what was read once is often still
  there. Where the budget is the whole machine that copy competes with the cache slots; ``keep_cached=False`` tells the
  system to forget a record once it is read.
- *direct* (O_DIRECT; F_NOCACHE on macOS), from the disk into the buffer: no copy by the processor and no page cache.
  It needs offsets, lengths and addresses that are multiples of 4096, which those of large records and their cache slots
  are. Of a small record the pages that it lies in are read, and what it has of them is copied. What else is not
  aligned, or what the file system refuses, is buffered, and so is everything on Windows (``system_calls.py``).

``read_mode`` decides between them. What was read is looked at before anybody computes with it
(``format/record_check.py``).
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from conmoe_edge.checkpoint.format.layout import PAGE, SMALL_RECORD
from conmoe_edge.checkpoint.format.manifest import PrototypeEntry, RecordLayout
from conmoe_edge.checkpoint.format.record_check import RecordCheck
from conmoe_edge.checkpoint.fs.contained import open_inside
from conmoe_edge.errors import CheckpointError, PackageError
from conmoe_edge.offload.storage.slot_pool import host_buffer
from conmoe_edge.system_calls import (
    direct_flag,
    direct_way,
    drop_from_cache,
    expect_random_reads,
    leave_the_cache,
    read_at,
)
from conmoe_edge.units import round_up

_LARGEST_READ = 1 << 30  # the kernel moves at most 2 GiB - 4096 bytes a call

ReadMode = Literal["buffered", "direct"]


class RecordStore:
    """The prototypes of one package on disk, by prototype number."""

    def __init__(
        self,
        folder: Path,
        prototypes: Sequence[PrototypeEntry],
        layouts: Sequence[RecordLayout],
        *,
        keep_cached: bool = True,
    ) -> None:
        self._folder = folder
        self._prototypes = tuple(prototypes)
        self._layouts = tuple(layouts)
        self._checks = [RecordCheck(layout) for layout in self._layouts]
        self._keep_cached = keep_cached
        self._files: dict[str, int] = {}
        self._direct: dict[str, int] = {}  # second handles, from the first direct read on
        self._mode: ReadMode = "buffered"
        self._lock = threading.Lock()
        self._pages = threading.local()
        self._closing = weakref.finalize(
            self, _close, self._files, self._direct
        )  # also when a model is simply dropped
        for name in sorted({entry.file for entry in self._prototypes}):
            self._open(name)

    @property
    def count(self) -> int:
        """How many prototypes there are."""
        return len(self._prototypes)

    def record_bytes(self, number: int) -> int:
        """Size of a prototype's record."""
        return self._layouts[self._prototypes[number].layout].nbytes

    def read_into(self, number: int, target: Tensor) -> None:
        """Read one whole record into ``target``: uint8 [record bytes] on the host.

        Raises:
            PackageError: the file is missing, short or unreadable, or the record's scales or columns are no such.
            ValueError: ``target`` has another size.
        """
        entry = self._prototypes[number]
        nbytes = self.record_bytes(number)
        if target.numel() != nbytes:
            raise ValueError(f"a record of {nbytes} bytes into {target.numel()}")
        buffer: Any = memoryview(target.numpy())  # type: ignore[arg-type]
        handle = self._files[entry.file]
        direct = self._direct.get(entry.file) if self._mode == "direct" else None
        done = 0
        if (target.data_ptr() | nbytes | entry.offset) % PAGE:
            if direct is not None and nbytes < SMALL_RECORD:
                done = self._by_pages(direct, entry.offset, buffer)
            direct = None
        while done < nbytes:
            piece = buffer[done : min(nbytes, done + _LARGEST_READ)]
            try:
                count = read_at(
                    handle if direct is None else direct, piece, entry.offset + done, self._lock
                )
            except OSError as error:
                if direct is not None:  # refused, or a real error that the next round shows
                    direct = None
                    if error.errno == errno.EINVAL:
                        self.read_buffered()
                    continue
                raise self._damaged(entry.file, f"the system says: {error.strerror}") from error
            if count == 0:
                end = entry.offset + nbytes
                raise self._damaged(
                    entry.file, f"it ends before byte {end}, where a prototype's record ends"
                )
            done += count
            if done % PAGE:
                direct = None  # the rest of an interrupted read
        if not self._keep_cached and direct is None:
            drop_from_cache(handle, entry.offset, nbytes)
        why = self._checks[entry.layout].wrong(target)
        if why:
            raise self._damaged(entry.file, f"{why} in the record of prototype {list(entry.id)}")

    @property
    def mode(self) -> ReadMode:
        """How records are read now."""
        return self._mode

    def read_direct(self) -> bool:
        """Read directly from now on; False where the system cannot, and nothing changes."""
        if not direct_way():
            return False
        try:
            for name in self._files.keys() - self._direct.keys():
                self._direct[name] = open_inside(self._folder, name, direct_flag())
                leave_the_cache(self._direct[name])
        except (CheckpointError, OSError):
            return False
        self._mode = "direct"
        return True

    def read_buffered(self) -> None:
        """Read through the page cache from now on; reads under way end as they began."""
        self._mode = "buffered"

    def close(self) -> None:
        """Close the files; reads afterwards are errors of the caller."""
        self._closing()

    def _by_pages(self, handle: int, offset: int, target: memoryview) -> int:
        """Read a small record by way of the pages that it lies in: its bytes, or 0 where they did not come whole."""
        start = offset - offset % PAGE
        skipped, nbytes = offset - start, len(target)
        room = getattr(self._pages, "room", None)
        if (
            room is None
        ):  # two pages more than a record, of which it may have the end and the beginning
            pages: Any = host_buffer(SMALL_RECORD + 2 * PAGE).numpy()
            room = self._pages.room = memoryview(pages)
        try:
            count = read_at(handle, room[: round_up(skipped + nbytes, PAGE)], start, self._lock)
        except OSError as error:
            if error.errno == errno.EINVAL:
                self.read_buffered()
            return 0
        if count < skipped + nbytes:
            return 0
        target[:] = room[skipped : skipped + nbytes]
        return nbytes

    def _open(self, name: str) -> None:
        try:
            handle = open_inside(self._folder, name)
        except CheckpointError as error:
            self.close()
            raise self._damaged(name, str(error)) from error
        self._files[name] = handle
        # Records are read whole and in no order: reading ahead of a record would be wasted.
        expect_random_reads(handle)

    def _damaged(self, name: str, why: str) -> PackageError:
        return PackageError(
            f"The prototypes in {self._folder / name} cannot be read.",
            why,
            "Write the package again: conmoe-edge fit MODEL --out DIR --overwrite",
        )


def _close(*handles: dict[str, int]) -> None:
    for files in handles:
        while files:
            os.close(files.popitem()[1])
