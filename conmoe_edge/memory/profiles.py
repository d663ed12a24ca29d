"""Profiles of machines: small TOML files, shipped ones and the user's own.

In: ``profiles/*.toml`` of this package and of the user's config folder (``CONMOE_CONFIG_DIR`` names
another one). The name of a profile is the name of its file without ``.toml``. A user's profile of
the same name takes the place of a shipped one; with ``base = "rtx-4090"`` it only says what differs
from that shipped profile.
Out: frozen ``Profile`` objects, sizes in bytes and bandwidths in bytes per second.
Raises ``UsageError``: unknown name (with the nearest ones), or a file with a mistake (file, key and
fix named).
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_config_path
from pydantic import BaseModel, ConfigDict, ValidationError

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.budget import DeviceKind
from conmoe_edge.units import MIB, parse_size

CONFIG_DIR_VARIABLE = "CONMOE_CONFIG_DIR"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Profile:
    """One target. ``memory`` and ``reserve`` are of the device tier; ``origin`` is its place."""

    name: str
    title: str
    device: DeviceKind
    memory: int
    reserve: int
    memory_bandwidth: float | None
    link_bandwidth: float | None
    disk_bandwidth: float | None
    host_memory: int | None
    source: str
    origin: str

    @property
    def usable(self) -> int:
        """Bytes that a model may take: what is there less what the system keeps."""
        return self.memory - self.reserve


class _ProfileFile(BaseModel):
    """What a TOML file may say. Sizes are ``"12GiB"`` or whole MiB, bandwidths ``"25.6GB/s"``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    base: str | None = None
    title: str | None = None
    device: Literal["cpu", "cuda"] | None = None
    memory: str | int | None = None
    reserve: str | int | None = None
    memory_bandwidth: str | None = None
    link_bandwidth: str | None = None
    disk_bandwidth: str | None = None
    host_memory: str | int | None = None
    source: str | None = None


def shipped_folder() -> Path:
    """Where the shipped profiles lie: inside the package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "profiles", package.parent / "profiles"):
        if any(folder.glob("*.toml")):
            return folder
    raise UsageError(
        "The profiles that ship with conmoe-edge are missing.",
        f"there is no {package / 'profiles'}",
        "Install conmoe-edge again, or give a size: --gpu 8GB",
    )


def user_folder() -> Path:
    """Where the user's own profiles lie; the folder need not exist."""
    redirected = os.environ.get(CONFIG_DIR_VARIABLE)
    root = Path(redirected) if redirected else user_config_path("conmoe-edge", appauthor=False)
    return root / "profiles"


def list_profiles() -> tuple[Profile, ...]:
    """Every profile, sorted by name, the user's own in place of shipped ones of the same name."""
    return tuple(_read(name, path) for name, path in sorted(_files().items()))


def get_profile(name: str) -> Profile:
    """The profile called ``name`` (capital letters do not matter)."""
    files = _files()
    wanted = name.strip().lower()
    if wanted in files:
        return _read(wanted, files[wanted])
    near = difflib.get_close_matches(wanted, sorted(files), n=3, cutoff=0.5)
    raise UsageError(
        f"{name!r} is neither a size nor a profile.",
        f"the nearest profiles are {', '.join(near)}"
        if near
        else f"the profiles are {', '.join(sorted(files))}",
        f"--gpu {near[0]}"
        if near
        else "--gpu 8GB for a size; `conmoe-edge profiles list` shows all profiles",
    )


def _files() -> dict[str, Path]:
    """Profile name -> file; later folders win."""
    found = {path.stem.lower(): path for path in sorted(shipped_folder().glob("*.toml"))}
    found.update({path.stem.lower(): path for path in sorted(user_folder().glob("*.toml"))})
    return found


def _read(name: str, path: Path) -> Profile:
    """Read one file, lay it over its base, convert the units."""
    if not _NAME.fullmatch(name) or name == "auto" or parse_size(name) is not None:
        raise _bad(
            path,
            "the file name",
            "it cannot be told from a size or a flag",
            "use a name such as my-laptop.toml",
        )
    said = _validated(path)
    origin = "shipped" if path.parent == shipped_folder() else str(path)
    if said.base is not None:
        base_path = shipped_folder() / f"{said.base}.toml"
        if not _NAME.fullmatch(said.base) or not base_path.is_file():
            names = ", ".join(sorted(p.stem for p in shipped_folder().glob("*.toml")))
            raise _bad(path, "base", f"{said.base!r} is no shipped profile", f"use one of {names}")
        said = _validated(base_path).model_copy(update=said.model_dump(exclude_unset=True))
    if said.device is None or said.memory is None:
        missing = "device" if said.device is None else "memory"
        example = 'device = "cuda"' if said.device is None else 'memory = "12GiB"'
        raise _bad(path, missing, "it is missing", f"add a line such as {example}")
    memory = _size(path, "memory", said.memory)
    reserve = _size(path, "reserve", said.reserve) if said.reserve is not None else 0
    if memory <= reserve:
        raise _bad(
            path, "reserve", "it leaves no memory for a model", "make it smaller than memory"
        )
    return Profile(
        name=name,
        title=said.title or name,
        device=said.device,
        memory=memory,
        reserve=reserve,
        memory_bandwidth=_bandwidth(path, "memory_bandwidth", said.memory_bandwidth),
        link_bandwidth=_bandwidth(path, "link_bandwidth", said.link_bandwidth),
        disk_bandwidth=_bandwidth(path, "disk_bandwidth", said.disk_bandwidth),
        host_memory=_size(path, "host_memory", said.host_memory)
        if said.host_memory is not None
        else None,
        source=said.source or "",
        origin=origin,
    )


def _validated(path: Path) -> _ProfileFile:
    """The keys of one file, types checked."""
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise _bad(
            path, "the text", f"it is not TOML: {error}", "write one `key = value` a line"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(
            path, "the file", f"it cannot be read: {error}", "check its permissions and encoding"
        ) from error
    try:
        return _ProfileFile.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        keys = list(_ProfileFile.model_fields)
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, keys, n=1)
            fix = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
            raise _bad(path, key, "no such key", fix) from error
        fix = {
            "device": '"cpu" or "cuda"',
            "memory_bandwidth": 'text such as "1008GB/s"',
            "link_bandwidth": 'text such as "25.6GB/s"',
            "disk_bandwidth": 'text such as "3GB/s"',
            "title": "text in quotes",
            "source": "text in quotes",
            "base": "the name of a shipped profile in quotes",
        }.get(key, 'text such as "12GiB", or a whole number of MiB')
        raise _bad(path, key, f"{first['input']!r} is not accepted", f"use {fix}") from error


def _size(path: Path, key: str, value: str | int) -> int:
    """Bytes of a size string or of whole MiB."""
    count = value * MIB if isinstance(value, int) else parse_size(value)
    if count is None or count < 0 or (count == 0 and key != "reserve"):
        raise _bad(
            path, key, f"{value!r} is no size", 'use text such as "12GiB", or a whole number of MiB'
        )
    return count


def _bandwidth(path: Path, key: str, value: str | None) -> float | None:
    """Bytes per second of ``"25.6GB/s"``."""
    if value is None:
        return None
    count = parse_size(value.removesuffix("/s")) if value.endswith("/s") else None
    if not count:
        raise _bad(path, key, f"{value!r} is no bandwidth", 'use text such as "25.6GB/s"')
    return float(count)


def _bad(path: Path, key: str, why: str, fix: str) -> UsageError:
    return UsageError(f"The profile {path} cannot be used: {key}.", why, fix[0].upper() + fix[1:])
