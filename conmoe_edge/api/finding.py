"""One finding of ``doctor``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. ``fix`` is a command or an action, and is empty where nothing is wrong."""

    name: str
    status: Status
    text: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as plain JSON."""
        return asdict(self)
