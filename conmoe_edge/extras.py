"""How the packages of an extra are installed, in a command that works wherever this one was installed from.

The name ``conmoe-edge`` leads to no package index yet, and a clone may be gone; so the packages themselves are named,
as the installed metadata has them.
"""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "conmoe-edge"
ELSEWHERE = "pip install .    # in a clone of conmoe-edge; Python 3.11 or newer"
"""For readers who are on another machine: the line of the README."""


def install_command(extra: str) -> str:
    """``pip install 'fastapi>=0.115' ...``; where nothing is installed, from the folder that this runs from."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = []
    marks = (f'extra == "{extra}"', f"extra == '{extra}'")
    named = [line.partition(";")[0].strip() for line in lines if line.rstrip().endswith(marks)]
    if not named:
        return f"pip install '.[{extra}]' in the folder of conmoe-edge"
    return "pip install " + " ".join(f"'{one}'" for one in named)
