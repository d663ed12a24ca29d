"""The fields of an architecture in GGUF's metadata: each is read once, checked, and none is left over.

What llama.cpp computes depends on these fields. One that nothing here asked for may change the model, so it is refused
by name (``refuse_unread``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from conmoe_edge.errors import CheckpointError, UnsupportedModel

PLAIN_MODEL = "name the model itself, in safetensors: conmoe-edge plan org/model"
_AGAIN = "Download the file again; if it is the same afterwards, the file itself is broken."
_MOST = 1 << 40
MISSING: Any = object()


class Fields:
    """The metadata below ``architecture``; keys are given without it (``block_count``)."""

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._prefix = f"{architecture}."
        self._values = metadata
        self._read: set[str] = set()

    def count(self, key: str, default: Any = MISSING) -> Any:
        """A whole number above 0."""
        value = self._get(key, default)
        if value is default:
            return value
        if type(value) is not int or not 0 < value < _MOST:
            self._wrong(key, value, "it is a whole number above 0")
        return value

    def whole(self, key: str, default: Any = MISSING) -> Any:
        """A whole number, 0 included."""
        value = self._get(key, default)
        if value is not default and (type(value) is not int or not 0 <= value < _MOST):
            self._wrong(key, value, "it is a whole number")
        return value

    def number(self, key: str, default: Any = MISSING) -> Any:
        """A finite number."""
        value = self._get(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not math.isfinite(value):
            self._wrong(key, value, "it is a number")
        return _shortest(float(value))

    def positive(self, key: str, default: Any = MISSING) -> Any:
        """A finite number above 0."""
        value = self.number(key, default)
        if value is not default and value <= 0:
            self._wrong(key, value, "it is a number above 0")
        return value

    def text(self, key: str, default: Any = MISSING) -> Any:
        """A text."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            self._wrong(key, value, "it is a text")
        return value

    def truth(self, key: str, default: Any = MISSING) -> Any:
        """True or false."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, bool):
            self._wrong(key, value, "it is true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """A field that may be missing, or have one of these values, because the model has no other.

        Raises:
            UnsupportedModel: it has another one.
        """
        value = self._get(key, None)
        if value is None:
            return
        if not any(_same(value, one) for one in allowed):
            self.refuse(
                key, value, f"only {' or '.join(str(one) for one in allowed)} is computed here"
            )

    def refuse_unread(self) -> None:
        """Refuse the model where a field of its architecture was not asked for.

        Raises:
            UnsupportedModel: names the field.
        """
        for key in sorted(self._values):
            if key.startswith(self._prefix) and key not in self._read:
                value = self._values[key]
                short = key.removeprefix(self._prefix)
                self.refuse(short, value, "nothing here knows what this field does to the model")

    def refuse(self, key: str, value: Any, why: str) -> NoReturn:
        """The field says something that is not computed here."""
        raise UnsupportedModel(
            f"{self.path} says {self._prefix}{key} = {_shown(value)}.", why, PLAIN_MODEL
        )

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(self._prefix + key)
        value = self._values.get(self._prefix + key, default)
        if value is MISSING:
            raise CheckpointError(
                f"{self.path} does not say {self._prefix}{key}.",
                "the model cannot be built without it",
                _AGAIN,
            )
        return value

    def _wrong(self, key: str, value: Any, why: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path} says {self._prefix}{key} = {_shown(value)}.", why, _AGAIN
        )


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)
    return type(value) is type(other) and value == other


def _shortest(value: float) -> float:
    """The decimal that a converter meant: GGUF keeps numbers in fp32, so 1e-6 comes back as 9.999999974752427e-07."""
    short = float(f"{value:.7g}")
    return short if _fp32(short) == value else value


def _fp32(value: float) -> float:
    import numpy as np

    return float(np.float32(value))


def _shown(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
