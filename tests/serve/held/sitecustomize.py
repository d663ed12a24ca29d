"""Run by Python at the start of every process whose path has this folder. In those of a server, ``held_rounds.py`` has
its say in a module once it is imported. Nothing is imported for it, so the processes that do without torch still do.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

_TOUCHED = ("engine", "guard", "settings")


class _Loader(SourceFileLoader):
    def exec_module(self, module: Any) -> None:
        super().exec_module(module)
        from tests.serve.held_rounds import touch

        touch(module)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        folder, _, last = name.rpartition(".")
        if folder != "conmoe_edge.serve" or last not in _TOUCHED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.origin is not None, name
        spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder)  # pyright: ignore[reportArgumentType]
