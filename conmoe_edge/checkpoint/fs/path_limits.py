"""How long a path may be on Windows, said before hours of work end in one that is too long.

Without long paths, which a setting of the system allows, Windows takes 259 characters. A run's own folder lies beside
the output and has a longer name, so its longest file is what counts. Other systems have limits that nobody meets.
No torch. Peak memory: nothing. Raises ``UsageError``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conmoe_edge.errors import UsageError
from conmoe_edge.system_calls import system_name

MOST = 259
LONGEST_INSIDE = 64
"""Characters of the longest name that a run makes in its folders, with a suffix and the separator."""
_SETTING = r"SYSTEM\CurrentControlSet\Control\FileSystem"
TURN_ON = r"reg add HKLM\SYSTEM\CurrentControlSet\Control\FileSystem /v LongPathsEnabled /t REG_DWORD /d 1 /f"


def check_length(
    folder: Path, system: str | None = None, *, long_paths: bool | None = None
) -> None:
    """Refuse a run's ``folder`` whose files would have too long a path on ``system``, this one by default.

    Raises:
        UsageError: with the characters that are too many.
    """
    if (system or system_name()) != "windows":
        return
    if long_paths if long_paths is not None else long_paths_enabled():
        return
    many = len(str(folder)) + LONGEST_INSIDE - MOST
    if many > 0:
        raise UsageError(
            f"{folder} is too deep for Windows: the paths in it would have {many} characters too many.",
            f"Windows takes {MOST} unless long paths are turned on",
            f"A shorter --out, or as administrator: {TURN_ON}",
        )


def long_paths_enabled() -> bool:
    """Whether this Windows takes long paths; elsewhere they need nothing."""
    try:
        import winreg
    except ImportError:
        return True
    registry: Any = winreg
    try:
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, _SETTING) as key:
            return bool(registry.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:
        return False
