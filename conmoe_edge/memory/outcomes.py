"""What earlier fits cost in quality, kept in the user's cache folder: small JSON, best effort.

Every ``fit`` that ends with a receipt leaves one entry; a later ``plan`` or ``fit`` of the same model
shows it beside the setting that it belongs to (``plan/advice.py``). The newest entry of a setting
takes the place of the older one. A cache that cannot be read is empty, and one that
cannot be written forgets.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from conmoe_edge.memory.bandwidth import cache_folder

_NAME = "outcomes.json"
_MOST_BYTES = 1 << 20
_MOST_ENTRIES = 500


@dataclass(frozen=True, slots=True)
class Outcome:
    """One setting of one model, and what it cost.

    ``model`` is the source's fingerprint; ``pool_bytes`` all records; ``bits`` a weight, where each prototype has those
    that it is worth, else 0; ``loss_rise`` nats a token on
    ``tokens`` held-out tokens of the text with the hash ``calibration``, ``kl`` against the original.
    """

    model: str
    method: str
    rate: float
    scope: int
    precision: str
    dense_precision: str
    wide_prototypes: int
    pool_bytes: int
    loss_rise: float
    kl: float
    tokens: int
    calibration: str
    version: str
    bits: float = 0.0
    kv_precision: str = "source"

    @property
    def setting(self) -> tuple[object, ...]:
        """What the entry is of, apart from what was measured."""
        return (
            *(self.model, self.method, self.rate, self.scope, self.precision),
            *(self.dense_precision, self.kv_precision, self.wide_prototypes, self.calibration),
            round(self.bits, 2),
        )


def recall(model: str) -> tuple[Outcome, ...]:
    """The entries of a model, oldest first."""
    return tuple(one for one in _entries() if one.model == model)


def remember(outcome: Outcome) -> None:
    """Keep an entry."""
    known = [one for one in _entries() if one.setting != outcome.setting]
    kept = [*known, outcome][-_MOST_ENTRIES:]
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps([asdict(one) for one in kept], indent=1), encoding="utf-8")
        temporary.replace(folder / _NAME)


def _entries() -> list[Outcome]:
    try:
        path = cache_folder() / _NAME
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > _MOST_BYTES:
            return []
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    found = [_entry(one) for one in value] if isinstance(value, list) else []
    return [one for one in found if one is not None]


def _entry(value: Any) -> Outcome | None:
    """One entry if it is whole and its numbers are numbers, else ``None``."""
    names = {one.name for one in fields(Outcome)}
    if not isinstance(value, Mapping) or not names - {"bits"} <= set(value) <= names:
        return None
    value = {"bits": 0.0, **value}  # an entry of a version that had none
    kinds: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
    for one in fields(Outcome):
        item = value[one.name]
        if not isinstance(item, kinds[str(one.type)]) or isinstance(item, bool):
            return None
        if not isinstance(item, str) and not math.isfinite(item):
            return None
    return Outcome(**value)
