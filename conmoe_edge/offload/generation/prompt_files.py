"""Prompts that are kept over restarts: ``--prompt-cache DIR``.

A file is a whole chunk of a prompt: keys, values and states of all layers (``prefix_chunks.py``) as safetensors. Its
name is a chain of digests,

    key of a chunk = SHA-256(key of the chunk before it, tokens),    the first one behind ``prompt_identity.py``

so that a file is found only by who has the same package, the same machine's arithmetic and the same tokens before it.
The text is not in there; but keys and values say much of it, so the folder and the files are the user's alone.

Each tensor has a digest over the key, its name, format, shape and bytes. It is compared before anything is computed
with it: a file that was cut off, changed, or renamed is taken away and told of, never used.

Files are written beside, synced and renamed, under a lock that other processes with the same folder wait for. When all
together are larger than they may be, those that were not used for the longest time are deleted; a chunk counts as used
when one behind it is, so ends go before beginnings.

Memory: one tensor while a file is written, one layer of a prompt while it is read. Nothing is raised for what lies in
the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from conmoe_edge.checkpoint.fs.atomic_files import TEMPORARY_SUFFIX
from conmoe_edge.checkpoint.fs.disk import disk_errors
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, index_files
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource, write_tensors
from conmoe_edge.errors import CheckpointError, ConmoeError, UsageError
from conmoe_edge.offload.generation.prefix_chunks import (
    Form,
    HeldChunk,
    PromptChunk,
    Tensors,
    standing_at,
)
from conmoe_edge.offload.generation.prompt_identity import prompt_identity

DEFAULT_BYTES = 2 * 10**9
"""Of all files of a folder together."""
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_LOCK = "lock"
_LOCK_SECONDS = 3.0
_DIGESTS = "digests"
_ANOTHER = "--prompt-cache with another folder"


class PromptCacheWarning(UserWarning):
    """Something in the folder of kept prompts was ignored, or nothing more is written there."""


class DamagedPrompt(Exception):
    """Chunk ``index`` of a prompt cannot be had from its file, which is gone now."""

    def __init__(self, index: int) -> None:
        self.index = index
        super().__init__(index)


class PromptFiles:
    """One folder, for the prompts of one loaded package. Not for several threads at once."""

    def __init__(
        self,
        folder: Path,
        identity: str,
        device: torch.device,
        size: int,
        *,
        most_bytes: int = DEFAULT_BYTES,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Make the folder where it is not there.

        Args:
            folder: of the files.
            identity: of all that keys and values depend on beside the tokens.
            device: where what is read goes.
            size: tokens of a chunk.
            most_bytes: of all files in the folder.
            tell: gets a line where a file is ignored; a ``PromptCacheWarning`` by default.

        Raises:
            UsageError: others may write to the folder, or it is another user's.
            ConmoeError: it cannot be made.
        """
        self.folder = folder
        self.hits = 0
        self.read_bytes = 0
        self.written_bytes = 0
        self._root = hashlib.sha256(identity.encode()).digest()
        self._device = device
        self._size = size
        self._most = most_bytes
        self._tell = tell or _warn
        self._writes = True
        self._last: tuple[list[list[int]], list[str]] = [], []
        with disk_errors(folder, _ANOTHER):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(folder)
        self._lock = FileLock(folder / _LOCK, timeout=_LOCK_SECONDS, mode=0o600)

    @classmethod
    def of_model(
        cls,
        model: Any,
        folder: Path,
        *,
        most_bytes: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> PromptFiles:
        """For a loaded package; ``most_bytes``: ``DEFAULT_BYTES`` unless it is said.

        Raises:
            UsageError, ConmoeError: as the constructor.
        """
        runtime = model.conmoe
        return cls(
            folder,
            prompt_identity(model),
            runtime.device,
            max(1, min(runtime.prefill_chunk, runtime.context)),
            most_bytes=DEFAULT_BYTES if most_bytes is None else most_bytes,
            tell=tell,
        )

    def further(
        self, chunks: Sequence[PromptChunk], tokens: Sequence[int], form: Form
    ) -> list[PromptChunk]:
        """``chunks``, the beginning of ``tokens``, and behind them those that files have, as far as a cache can stand
        behind them; at least one token is left to compute.
        """
        found: list[PromptChunk] = list(chunks)
        keys = self._keys(tokens[: (len(tokens) - 1) // self._size * self._size])
        for index in range(len(found), len(keys)):
            if not os.path.lexists(self._path(keys[index])):
                break
            found.append(_FileChunk(self, keys[index], index, form))
        found = found[: max(len(chunks), standing_at(found, form, self._size))]
        self._use(keys[: len(found)])
        return found

    def write(self, tokens: Sequence[int], chunk: HeldChunk) -> None:
        """Keep the last whole chunk of ``tokens``, which ends them, unless it is there."""
        keys = self._keys(tokens)
        path = self._path(keys[-1])
        if not self._writes:
            return
        if os.path.lexists(path):
            self._use(keys)
            return
        tensors = {
            f"{i}.{j}": one
            for i in range(len(chunk.layers))
            for j, one in enumerate(chunk.layer(i))
        }
        nbytes = sum(one.nbytes for one in tensors.values()) + (len(tensors) << 8)
        try:
            with self._lock:
                if not self._make_way(nbytes, keys):
                    return
                _write(path, keys[-1], tensors)
                self.written_bytes += nbytes
                self._use(keys)
        except Timeout:
            return  # another process is writing; what is missing is computed again
        except (ConmoeError, OSError) as error:
            self._writes = False
            why = getattr(error, "why", "") or str(error)
            self._tell(f"No more prompts are kept in {self.folder}: {why}")

    def discard(self, key: str, why: str) -> None:
        """Take a file away that is not what its name says."""
        path = self._path(key)
        with suppress(OSError):
            path.unlink()
        self._tell(f"The kept prompt {path} was ignored: {why}. It is computed again.")

    def _keys(self, tokens: Sequence[int]) -> list[str]:
        """Of the whole chunks of ``tokens``, hexadecimal. A prompt that grows has been here with all but its last."""
        chunks, keys = self._last
        found: list[str] = []
        parts: list[list[int]] = []
        before, same = self._root, True
        for index, start in enumerate(range(0, len(tokens) - self._size + 1, self._size)):
            part = list(tokens[start : start + self._size])
            same = same and index < len(keys) and part == chunks[index]
            if same:
                key = keys[index]
                before = bytes.fromhex(key)
            else:
                before = hashlib.sha256(before + struct.pack(f"<{len(part)}q", *part)).digest()
                key = before.hex()
            found.append(key)
            parts.append(part)
        self._last = parts, found
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _use(self, keys: Sequence[str]) -> None:
        """Note that the chunks were used now, the first of them last."""
        now = time.time_ns()
        for place, key in enumerate(reversed(keys)):
            with suppress(OSError):
                os.utime(self._path(key), ns=(now, now + 1000 * place), follow_symlinks=False)

    def _make_way(self, nbytes: int, keys: Sequence[str]) -> bool:
        """Delete what was not used for the longest time until ``nbytes`` fit; False where they do not fit beside the
        files of ``keys``. Under the lock.
        """
        own = {self._path(key).name for key in keys}
        found: list[tuple[int, int, Path]] = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(TEMPORARY_SUFFIX):
                if _NAME.fullmatch(entry.name.removesuffix(TEMPORARY_SUFFIX)):
                    Path(entry.path).unlink(missing_ok=True)  # of a process that was killed
            elif _NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # another process has taken it away
                    info = entry.stat(follow_symlinks=False)
                    found.append((info.st_mtime_ns, info.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in found)
        fixed = sum(size for _, size, path in found if path.name in own)
        if fixed + nbytes > self._most:
            return False
        for _, size, path in sorted(found):
            if total + nbytes <= self._most:
                break
            if path.name not in own:
                path.unlink(missing_ok=True)
                total -= size
        return True


class _FileChunk:
    """A chunk in a file; everything is there, or it is damaged."""

    has_ends = True

    def __init__(self, files: PromptFiles, key: str, index: int, form: Form) -> None:
        self._files, self._key, self._index, self._form = files, key, index, form
        self._opened: tuple[CheckpointIndex, dict[str, bytes]] | None = None

    def layer(self, index: int) -> Tensors:
        """As of ``PromptChunk``.

        Raises:
            DamagedPrompt: the file is gone, or not what its name says.
        """
        try:
            return self._layer(index)
        except CheckpointError as error:
            gone = not os.path.lexists(self._files._path(self._key))
            why = "" if gone else error.why or error.what
        except _Wrong as error:
            why = str(error)
        if why:  # else another process has taken it away
            self._files.discard(self._key, why.rstrip("."))
        raise DamagedPrompt(self._index)

    def drop(self, index: int) -> None:
        """As of ``PromptChunk``; nothing is held."""

    def _layer(self, index: int) -> Tensors:
        if self._opened is None:
            self._opened = self._open()
            self._files.hits += 1
        header, digests = self._opened
        found: list[Tensor] = []
        with ShardReader(header) as reader:
            while (name := f"{index}.{len(found)}") in digests:
                one = reader[name][...]
                if _digest(self._key, name, one) != digests[name]:
                    raise _Wrong(f"the content of tensor {name} is not what was written")
                self._files.read_bytes += one.nbytes
                found.append(one.to(self._files._device))
        self._check_shapes(index, found)
        return tuple(found)

    def _open(self) -> tuple[CheckpointIndex, dict[str, bytes]]:
        name = f"{self._key}.safetensors"
        header = index_files(self._files.folder, [name])
        names = sorted(one for one in header.tensors if one != _DIGESTS)
        entry = header.tensors.get(_DIGESTS)
        if entry is None or entry.dtype != "U8" or entry.shape != (len(names) + 1, 32):
            raise _Wrong("it has no digests")
        with ShardReader(header) as reader:
            rows = [bytes(row.tolist()) for row in reader[_DIGESTS][...]]
        if rows[-1] != _digest_of_names(self._key, names, rows[:-1]):
            raise _Wrong("its digests are not what was written")
        return header, dict(zip(names, rows, strict=False))

    def _check_shapes(self, index: int, found: Sequence[Tensor]) -> None:
        """The digests say that it is ours; this says that it was written for such a cache."""
        kind = self._form[index].kind
        if kind == "state" or not found:
            return
        tokens = [one.shape[-2] if one.dim() == 4 else -1 for one in found]
        size = self._files._size
        if len(found) != 2 or tokens[0] != tokens[1] or not 0 < tokens[0] <= size:
            raise _Wrong(f"layer {index} has other shapes")
        if kind == "rows" and tokens[0] != size:
            raise _Wrong(f"layer {index} has {tokens[0]} tokens of {size}")


class _Wrong(Exception):
    """A file is not what its name says; the text says why."""


def _write(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """The file of a chunk, for its user alone."""
    digests: dict[str, bytes] = {}

    def load(name: str) -> Tensor:
        one = tensors[name].contiguous().cpu()
        digests[name] = _digest(key, name, one)
        return one

    def all_digests() -> Tensor:
        names = sorted(tensors)
        rows = [digests[name] for name in names]
        rows.append(_digest_of_names(key, names, rows))
        return torch.tensor([list(row) for row in rows], dtype=torch.uint8)

    sources = [
        TensorSource(
            name, str(one.dtype).removeprefix("torch."), tuple(one.shape), _bound(load, name)
        )
        for name, one in tensors.items()
    ]
    # The last of the narrowest format, so it is written when all others are.
    sources.append(TensorSource(_DIGESTS, "uint8", (len(tensors) + 1, 32), all_digests))
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    write_tensors(path, sources)


def _bound(load: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: load(name)


def _digest(key: str, name: str, tensor: Tensor) -> bytes:
    found = hashlib.sha256(f"{key}\n{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
    flat = tensor.contiguous().reshape(-1)
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)
    return found.digest()


def _digest_of_names(key: str, names: Sequence[str], rows: Sequence[bytes]) -> bytes:
    return hashlib.sha256("\n".join([key, *names]).encode() + b"".join(rows)).digest()


def _check_private(folder: Path) -> None:
    if os.name != "posix":
        return
    info: Any = folder.stat()
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"Others may write to {folder}.",
            "what lies there would be computed with",
            f"chmod 700 {folder}, or {_ANOTHER}",
        )


def _warn(text: str) -> None:
    warnings.warn(text, PromptCacheWarning, stacklevel=4)
