"""Puts compiled libraries of the CPU operator into a wheel for one system.

``CONMOE_WHEEL`` names the system; ``tools/platform_wheels.py`` has compiled its libraries and sets it. Without it
nothing is done: the wheel is for every system, and the operator is compiled on first use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INSIDE = "conmoe_edge/offload/kernels/cpu/lib"


class Libraries(BuildHookInterface):
    """The hook; hatchling finds it by its base class."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        name = os.environ.get("CONMOE_WHEEL")
        if not name or version == "editable":
            return
        folder = Path(self.root) / "build" / "operator" / name
        libraries = sorted(folder.glob("*-*-*.*"))
        if not libraries:
            raise FileNotFoundError(
                f"{folder} holds no libraries: run python tools/platform_wheels.py {name}"
            )
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{(folder / 'TAG').read_text(encoding='utf-8').strip()}"
        build_data["force_include"].update({str(one): f"{INSIDE}/{one.name}" for one in libraries})
