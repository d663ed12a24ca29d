"""``/set``: the sampling settings of a chat, changed and shown as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings

_NUMBERS: dict[str, tuple[Callable[[str], float], float, float, str]] = {
    "temperature": (float, 0.0, 10.0, "0.6"),
    "top_p": (float, 0.01, 1.0, "0.95"),
    "top_k": (int, 0, 1 << 24, "40"),
    "max_tokens": (int, 1, 1 << 24, "512"),
    "seed": (int, 0, 2**63 - 1, "7"),
}


SETTINGS = (*_NUMBERS, "stop")
"""Their names; ``stop`` takes strings."""


def with_setting(settings: SamplingSettings, name: str, values: Sequence[str]) -> SamplingSettings:
    """A copy with one setting changed; values as they were typed, ``default`` takes it back.

    Raises:
        UsageError: no such setting, or not a value of it.
    """
    key = name.strip().lower().replace("-", "_")
    if key not in SETTINGS:
        raise UsageError(f"There is no setting {name!r}.", "", f"/set {'|'.join(SETTINGS)} VALUE")
    only = values[0] if len(values) == 1 else None
    if only is not None and only.strip().lower() == "default":
        return replace(settings, **{key: () if key == "stop" else None})
    if key == "stop":
        if not all(values):
            raise UsageError("An empty text ends no answer.", "", '/set stop "END"')
        return replace(settings, stop=tuple(values))
    convert, low, high, example = _NUMBERS[key]
    try:
        number = None if only is None else convert(only)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        said = " ".join(values)
        raise UsageError(f"{said!r} is no value for {key}.", "", f"/set {key} {example}")
    return replace(settings, **{key: number})


def setting_rows(settings: SamplingSettings) -> list[tuple[str, str]]:
    """Every setting and its value."""
    values = {name: getattr(settings, name) for name in _NUMBERS}
    rows = [(name, "default" if value is None else str(value)) for name, value in values.items()]
    return [*rows, ("stop", ", ".join(map(repr, settings.stop)) or "none")]
