"""The configurations in ``configs/``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Published:
    """Attributes:
    name: of the model on the hub.
    source: where the values come from.
    config: what decides the model that is built, as ``config.json`` has it.
    """

    name: str
    source: str
    config: dict[str, Any]

    @property
    def slug(self) -> str:
        """The name as the name of a folder."""
        return self.name.replace("/", "--")


def collection(folder: Path = FOLDER) -> list[Published]:
    """All of them, by name."""
    found = [Published(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    return sorted(found, key=lambda one: one.name.lower())
