"""The library of the operator for this processor: one that came with the wheel, or one that is compiled here, once.

``found_library()`` gives the path of a shared library. A wheel for this system brings one for every instruction set
(``tools/platform_wheels.py``), in ``lib/``; they count only if they were made from the source beside them. Else it is
compiled on the first call ever (under a minute; some by ``ziglang``) with the first compiler that does it, and found
in the user's cache folder afterwards.

The name of a library is a digest of everything that went into it (``library_files.py``): source, flags, layout of the
structures, and in the cache the compiler and the C library. Before it is used the first time it is tested in a process
of its own (``tried_apart.py``).

``CONMOE_OPERATOR_SANITIZE=1`` builds with the address and undefined-behaviour sanitizers, under a name of its own
(``make test-asan``).

Peak memory: the compiler's, in a process of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from conmoe_edge.offload.kernels.cpu.compilers import Compiler, compilers, none_found
from conmoe_edge.offload.kernels.cpu.compiling import SANITIZERS, compile_library, source_digest
from conmoe_edge.offload.kernels.cpu.levels import best_level
from conmoe_edge.offload.kernels.cpu.library_files import own_folder, put_library, whole_library
from conmoe_edge.offload.kernels.cpu.targets import Target, here
from conmoe_edge.offload.kernels.cpu.tried_apart import told_of, try_apart
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

SWITCH = "CONMOE_OPERATOR"
"""Environment variable; ``off`` keeps to torch's own kernels."""
SANITIZE = "CONMOE_OPERATOR_SANITIZE"
"""Environment variable; ``1`` builds with sanitizers."""
SHIPPED = Path(__file__).with_name("lib")
"""Where a wheel for one system has its libraries."""
_SECONDS, _SANITIZED_SECONDS = 400, 900


@dataclass(frozen=True, slots=True)
class Library:
    """A library that passed its test here.

    Attributes:
        path: of the shared library.
        level: the instruction set that it was made for (``levels.py``).
        made_by: a compiler of this machine, or the wheel.
    """

    path: Path
    level: str
    made_by: str


def library() -> Path:
    """As ``found_library``, which says what is raised."""
    return found_library().path


def found_library() -> Library:
    """The operator's library, compiled where there is none.

    Raises:
        Unavailable: switched off, a system without an operator, a level that is none of this machine, no compiler or
            none that does it, a cache that belongs to another user, or an operator that crashes or computes wrongly.
    """
    wanted = _Wanted.here()
    reasons: list[Unavailable] = []
    shipped = wanted.shipped()
    if shipped is not None:
        try:
            try_apart(shipped, _memory(), wanted.seconds)
            return Library(shipped, wanted.level, "came with the wheel")
        except Unavailable as error:
            reasons.append(error)
    folder = cache_folder()
    try:
        own_folder(folder)
        # A library that was compiled earlier, then one that is compiled now, each by the first compiler that does it.
        for build in (False, True):
            for compiler in wanted.compilers():
                try:
                    path = wanted.compiled(compiler, folder)
                    if path is None and build:
                        path = wanted.compile(compiler, folder)
                    if path is not None:
                        try_apart(path, folder, wanted.seconds)
                        return Library(path, wanted.level, compiler.version)
                except Unavailable as error:
                    reasons.append(error)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be used: {error.strerror}") from error
    raise reasons[0] if reasons else none_found()


def is_built() -> bool:
    """Whether ``found_library`` finds one that was tested, so that it does not take long.

    Raises:
        Unavailable: there can be none here.
    """
    wanted, folder = _Wanted.here(), cache_folder()
    shipped = wanted.shipped()
    if shipped is not None:
        return told_of(shipped, folder).is_file()
    there_is_one = False
    for compiler in wanted.compilers():  # each is a process that says its version
        there_is_one = True
        path = wanted.compiled(compiler, folder)
        if path is not None and told_of(path, folder).is_file():
            return True
    if not there_is_one:
        raise none_found()
    return False


def cache_folder() -> Path:
    """Where libraries are kept, and what is known of them."""
    return user_cache_path("conmoe-edge") / "operator"


def _memory() -> Path | None:
    """That folder, where it can be used."""
    with contextlib.suppress(OSError, Unavailable):
        own_folder(cache_folder())
        return cache_folder()
    return None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What library this machine takes."""

    target: Target
    level: str
    flags: tuple[str, ...]
    sanitized: bool

    @classmethod
    def here(cls) -> _Wanted:
        if os.environ.get(SWITCH, "").lower() == "off":
            raise Unavailable(f"{SWITCH}=off")
        target, level = here(), best_level()
        sanitized = os.environ.get(SANITIZE) == "1"
        flags = (*level.flags, *(SANITIZERS if sanitized else ()))
        return cls(target, level.name, flags, sanitized)

    @property
    def seconds(self) -> int:
        return _SANITIZED_SECONDS if self.sanitized else _SECONDS

    def compilers(self) -> Iterator[Compiler]:
        return (one for one in compilers() if not (self.sanitized and one.kind == "zig"))

    def shipped(self) -> Path | None:
        """That of the wheel, if it was made from this source."""
        if not SHIPPED.is_dir():
            return None
        key = shipped_key(self.target, self.level, self.flags)
        return whole_library(SHIPPED, key, self.target.suffix, ours=False)

    def compiled(self, compiler: Compiler, folder: Path) -> Path | None:
        return whole_library(folder, self._key(compiler), self.target.suffix, ours=True)

    def compile(self, compiler: Compiler, folder: Path) -> Path:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            built = Path(place) / f"operator{self.target.suffix}"
            compile_library(compiler, self.target, self.flags, built)
            return put_library(built, folder, self._key(compiler), self.target.suffix)

    def _key(self, compiler: Compiler) -> str:
        parts = (*compiler.identity, *platform.libc_ver())
        source = source_digest(self.target, self.flags)
        return hashlib.sha256("\0".join((source, *parts)).encode()).hexdigest()[:32]


def shipped_key(target: Target, level: str, flags: Sequence[str]) -> str:
    """First part of the name of a library in a wheel."""
    return f"{level}-{source_digest(target, flags)}"
