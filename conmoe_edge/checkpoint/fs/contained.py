"""The one decision whether a file of a model or of a package lies inside its folder, and the one way to open it.

A folder may come from anybody. A link in it could lead to any file that the user can read, and a pipe would keep
whoever opens it waiting for ever. So every file is opened by ``open_inside``: a plain name, links followed only where
they stay in the folder, and nothing but a plain file. The hub's cache is made of links:
``models--<id>/snapshots/<commit>/<file>`` leads to ``models--<id>/blobs/<hash>``, and that is allowed as well.

``check_entries`` is for libraries that take the folder and open what they like in it: it goes over all that is there.

What this decides holds for a folder that nobody changes meanwhile. Of changes in between, ``open_inside`` notices a
file that is not the one it decided about; a library that opens a path by itself does not.

No torch here. Peak memory: what ``read_inside`` is allowed to read. Raises ``CheckpointError`` and nothing else.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

from conmoe_edge.errors import CheckpointError
from conmoe_edge.system_calls import FOREIGN_FILE

MAX_JSON_BYTES = 256 << 20
"""The largest small file (config, tokenizer, index) that is read whole; the largest known tokenizers have 40 MB."""

_AGAIN = "Download the model again, or copy it again from where it came from."
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{kind}{number}" for kind in ("com", "lpt") for number in "0123456789¹²³"
}
"""What Windows takes for a device in every folder, with any ending."""


def is_plain_name(name: str) -> bool:
    """Whether ``name`` can only mean a file directly inside the folder that it is looked up in, on
    any system.
    """
    return (
        bool(name)
        and name not in (".", "..")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
        and not any(char in '/\\:\0<>"|?*' or ord(char) < 32 for char in name)
        and name.isprintable()
        and name[-1] not in ". "  # Windows drops these, so that two names mean one file
        and name.split(".")[0].rstrip(" ").lower() not in _DEVICES
    )


def is_there(folder: Path, name: str) -> bool:
    """Whether ``folder`` has an entry ``name`` of any kind, links that lead nowhere included."""
    return os.path.lexists(folder / name)


def path_inside(folder: Path, name: str) -> Path:
    """Where the plain file ``name`` of ``folder`` really lies, links followed.

    Raises:
        CheckpointError: no plain name, missing, outside the folder, or not a plain file.
    """
    return _found(folder, name)[0]


def open_inside(folder: Path, name: str, flags: int = 0) -> int:
    """A descriptor of the plain file ``name`` of ``folder``, open for reading; the caller closes it.

    ``flags`` are added to those of ``os.open``.

    Raises:
        CheckpointError: as ``path_inside``; the file cannot be opened, or was replaced meanwhile.
    """
    real, info = _found(folder, name)
    # The path is resolved, so a link in its last place has come since then. Non-blocking, because the same goes for a
    # pipe.
    try:
        handle = os.open(real, os.O_RDONLY | FOREIGN_FILE | flags)
    except OSError as error:
        _cannot_read(folder / name, error)
    opened = os.fstat(handle)
    if not stat.S_ISREG(opened.st_mode) or _identity(opened) != _identity(info):
        os.close(handle)
        raise CheckpointError(
            f"{folder / name} was replaced while it was being opened.",
            "Another program writes to this folder.",
            "Wait until it is done, and try again.",
        )
    return handle


def read_inside(folder: Path, name: str, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of the plain file ``name`` of ``folder``.

    Raises:
        CheckpointError: as ``open_inside``; the file has more than ``most_bytes``.
    """
    try:
        with os.fdopen(open_inside(folder, name), "rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        _cannot_read(folder / name, error)
    if len(data) > most_bytes:
        raise CheckpointError(
            f"{folder / name} is too large to be what its name says.",
            f"It has more than {most_bytes} bytes.",
            _AGAIN,
        )
    return data


def check_entries(folder: Path) -> None:
    """Refuse a folder with anything but plain files and folders in it, links that leave it above all.

    For a library that will open files in it by names of its own choice. Folders inside are not looked into, and names
    that begin with a dot are left alone: no library looks for these.

    Raises:
        CheckpointError: a link that leaves the folder or leads nowhere, a pipe, a device; the folder cannot be read.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        _cannot_read(folder, error)
    for entry in entries:
        plain = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
        if plain or entry.name.startswith(".") or _leads_to_folder(entry):
            continue
        _decide(folder, entry.name)


def _found(folder: Path, name: str) -> tuple[Path, os.stat_result]:
    """``path_inside``, and what the system says of the file."""
    if not is_plain_name(name):
        raise CheckpointError(
            f"{name!r} is no name of a file in {folder}.",
            "it must be the plain name of a file directly in that folder",
            _AGAIN,
        )
    return _decide(folder, name)


def _decide(folder: Path, name: str) -> tuple[Path, os.stat_result]:
    path = folder / name
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
    return real, info


def _stays(real: Path, home: Path) -> bool:
    """Whether ``real`` is in ``home``, or where the hub's cache keeps the files of the snapshot ``home`` (or of a
    folder directly in it).
    """
    if real.is_relative_to(home):
        return True
    for snapshot in (home, home.parent):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            return real.parent == repository / "blobs"
    return False


def _identity(info: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another in its place: its number alone may be given again at once."""
    if (
        os.name == "nt"
    ):  # where the two calls have disagreed about the numbers of one and the same file
        return (info.st_size,)
    return info.st_dev, info.st_ino, info.st_size, info.st_ctime_ns


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _cannot_read(path: Path, error: BaseException) -> NoReturn:
    reason = getattr(error, "strerror", None) or str(error)
    raise CheckpointError(f"Cannot read {path}.", reason, _AGAIN) from error
