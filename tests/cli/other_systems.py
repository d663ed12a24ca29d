"""Another system's standard library for the code of this package alone, on Linux.

``pretend("windows")`` gives every module of ``conmoe_edge`` that is imported afterwards ``os``, ``sys``, ``mmap``,
``signal`` and ``time`` without what Windows lacks, and refuses the modules that it does not have; libraries keep the
real ones. What it cannot show is how another system behaves: its file locks, paths and consoles are Linux's still.

``python -m other_systems windows FOLDER`` then imports every module, fits the tiny package in ``FOLDER`` and chats.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import io
import pkgutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from names_of_systems import MODULES_NOT_ON_WINDOWS, NOT_ON_MACOS, NOT_ON_WINDOWS

_OURS = "conmoe_edge"
_FACTS = {
    "windows": {"os": {"name": "nt"}, "sys": {"platform": "win32"}},
    "darwin": {"os": {"name": "posix"}, "sys": {"platform": "darwin"}},
}


class _Without(ModuleType):
    """A module without some of its names, and with others instead."""

    def __init__(self, real: ModuleType, gone: set[str], instead: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(_real=real, _gone=gone, **instead)

    def __getattr__(self, name: str) -> Any:
        if name in self._gone:
            raise AttributeError(f"{self.__name__}.{name} is not there on this system")
        return getattr(self._real, name)


class _Kernel:
    """Of Windows' library what this package calls."""

    def GlobalMemoryStatusEx(self, status: Any) -> int:
        """64 GiB may still be committed."""
        status._obj.commit_left = 64 << 30
        return 1


def pretend(system: str) -> None:
    """From now on the modules of the package see ``windows`` or ``darwin``."""
    table = NOT_ON_WINDOWS if system == "windows" else NOT_ON_MACOS
    absent = MODULES_NOT_ON_WINDOWS if system == "windows" else ()
    seen = {
        name: _Without(importlib.import_module(name), set(gone.split()), {})
        for name, gone in table.items()
    }
    seen["sys"] = _Without(sys, set(), {})
    for name, instead in _FACTS[system].items():
        seen[name].__dict__.update(instead)
    if system == "windows":
        seen["ctypes"] = _Without(ctypes, set(), {"windll": SimpleNamespace(kernel32=_Kernel())})
    real = builtins.__import__

    def given(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        ours = str((globals or {}).get("__name__", "")).partition(".")[0] == _OURS
        if ours and level == 0:
            if name in absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in seen:
                return seen[name]
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = given


def every_module() -> list[str]:
    """Names of all modules of the package, imported; optional packages may be missing."""
    import conmoe_edge

    names = []
    for one in pkgutil.walk_packages(conmoe_edge.__path__, "conmoe_edge."):
        if one.name.rpartition(".")[2] != "__main__" and not one.name.startswith(_NOT_IMPORTED):
            importlib.import_module(one.name)
            names.append(one.name)
    return names


_NOT_IMPORTED = ("conmoe_edge.integrations.vllm", "conmoe_edge.export.llama.quantise_program")
"""Programs, and what needs a package that is not there."""


def main() -> None:
    """Import all, fit, fit again in its place, chat, and have ``doctor`` look."""
    system, model, text, folder = sys.argv[1], *map(Path, sys.argv[2:])
    pretend(system)
    print(len(every_module()), "modules")
    from conmoe_edge.cli.main import main as program

    def run(*words: str) -> str:
        out = io.StringIO()
        try:
            with redirect_stdout(out):
                program.main([*words], prog_name="conmoe-edge")
        except SystemExit as end:
            assert end.code in (0, None), (words, end.code, out.getvalue()[-500:])
        return out.getvalue()

    package = str(folder / "out")
    fit = (
        "fit",
        str(model),
        "--out",
        package,
        "--gpu",
        "900MB",
        "--device",
        "cpu",
        "--rate",
        "50%",
    )
    fit += ("--calibration", str(text), "--calibration-tokens", "512", "--offline", "--quiet")
    run(*fit, "--method", "reap")
    run(*fit, "--method", "conmoe", "--overwrite")
    print("answer", repr(run("chat", package, "--prompt", "Hello", "--max-tokens", "4")))
    print(run("doctor", "--folder", str(folder)))


if __name__ == "__main__":
    main()
