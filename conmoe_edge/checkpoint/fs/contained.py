"""The one decision whether a file of a model or of a package lies inside its folder, and the one way to open it.

A folder may come from anybody. A link in it could lead to any file that the user can read, and a pipe would keep
whoever opens it waiting for ever. So every file is opened by ``open_inside``: a plain name, links followed only where
they stay in the folder, and nothing but a plain file. The hub's cache is made of links: ``snapshots/<commit>/<file>``
leads to ``blobs/<hash>`` of the same repository, and that is allowed as well.

No torch here. Peak memory: what ``read_inside`` is allowed to read. Raises ``CheckpointError`` and nothing else.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

from conmoe_edge.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20
"""The largest small file (config, tokenizer, index) that is read whole; the largest known tokenizers have 40 MB."""

_AGAIN = "Download the model again, or copy it again from where it came from."


def is_plain_name(name: str) -> bool:
    """Whether ``name`` can only mean a file directly inside the folder that it is looked up in, on
    any system.
    """
    return (
        bool(name)
        and name not in (".", "..")
        and len(name) <= 255
        and not any(char in '/\\:\0<>"|?*' or ord(char) < 32 for char in name)
        and name.isprintable()
    )


def is_there(folder: Path, name: str) -> bool:
    """Whether ``folder`` has an entry ``name`` of any kind, links that lead nowhere included."""
    return os.path.lexists(folder / name)


def path_inside(folder: Path, name: str) -> Path:
    """Where the plain file ``name`` of ``folder`` really lies, links followed.

    Raises:
        CheckpointError: no plain name, missing, outside the folder, or not a plain file.
    """
    path = folder / name
    if not is_plain_name(name):
        raise CheckpointError(
            f"{name!r} is no name of a file in {folder}.",
            "it must be the plain name of a file directly in that folder",
            _AGAIN,
        )
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
        info = real.stat()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {name}.",
            "It is a link that leads nowhere." * path.is_symlink(),
            _AGAIN,
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        _cannot_read(path, error)
    if not _stays(real, home):
        raise CheckpointError(
            f"{path} is a link that leaves the model's folder.",
            f"It leads to {real}.",
            "Put the file itself into the folder.",
        )
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a plain file.", "", _AGAIN)
    return real


def open_inside(folder: Path, name: str, flags: int = 0) -> int:
    """A descriptor of the plain file ``name`` of ``folder``, open for reading; the caller closes it.

    ``flags`` are added to those of ``os.open``.

    Raises:
        CheckpointError: as ``path_inside``; the file cannot be opened.
    """
    real = path_inside(folder, name)
    # The path is resolved, so a link in its last place has come since then. Non-blocking, because the same goes for a
    # pipe.
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_BINARY", 0) | safe | flags)
    except OSError as error:
        _cannot_read(folder / name, error)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{folder / name} is not a plain file.", "", _AGAIN)
    return handle


def read_inside(folder: Path, name: str, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of the plain file ``name`` of ``folder``.

    Raises:
        CheckpointError: as ``open_inside``; the file has more than ``most_bytes``.
    """
    try:
        with os.fdopen(open_inside(folder, name), "rb") as file:
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise CheckpointError(
                    f"{folder / name} is too large to be what its name says.",
                    f"It has more than {most_bytes} bytes.",
                    _AGAIN,
                )
            return file.read(most_bytes)
    except OSError as error:
        _cannot_read(folder / name, error)


def _stays(real: Path, home: Path) -> bool:
    """Whether ``real`` is in ``home``, or where the hub's cache keeps the files of the snapshot ``home``."""
    if real.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs")


def _cannot_read(path: Path, error: BaseException) -> NoReturn:
    reason = getattr(error, "strerror", None) or str(error)
    raise CheckpointError(f"Cannot read {path}.", reason, _AGAIN) from error
