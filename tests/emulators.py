"""Programs of the system that run those of another processor or system, by whatever name they are installed."""

from __future__ import annotations

import shutil
from pathlib import Path

_PLACES = {"wine64": "/usr/lib/wine/wine64"}
"""Where Debian has what it does not put on the path."""


def emulator(name: str) -> str | None:
    """The path of ``qemu-aarch64``, ``qemu-x86_64``, ``wine64``, ...; ``None`` where it is not installed. Programs of
    qemu that are linked statically, as Debian's qemu-user-static has them, are called NAME-static.
    """
    names = (name, f"{name}-static") if name.startswith("qemu-") else (name,)
    found = next(filter(None, map(shutil.which, names)), _PLACES.get(name, ""))
    return found if Path(found).is_file() else None
