"""``/set``: the sampling settings of a chat, changed and shown as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings

_SETTINGS: dict[str, tuple[Callable[[str], float], float, float, str]] = {
    "temperature": (float, 0.0, 10.0, "0.6"),
    "top_p": (float, 0.01, 1.0, "0.95"),
    "max_tokens": (int, 1, 1 << 24, "512"),
    "seed": (int, 0, 2**63 - 1, "7"),
}


def with_setting(settings: SamplingSettings, name: str, value: str) -> SamplingSettings:
    """A copy with one setting changed; the value as it was typed, ``default`` takes it back.

    Raises:
        UsageError: no such setting, or not a value of it.
    """
    key = name.strip().lower().replace("-", "_")
    if key not in _SETTINGS:
        raise UsageError(f"There is no setting {name!r}.", "", f"/set {'|'.join(_SETTINGS)} VALUE")
    convert, low, high, example = _SETTINGS[key]
    if value.strip().lower() == "default":
        return replace(settings, **{key: None})
    try:
        number = convert(value)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        raise UsageError(f"{value!r} is no value for {key}.", "", f"/set {key} {example}")
    return replace(settings, **{key: number})


def setting_rows(settings: SamplingSettings) -> list[tuple[str, str]]:
    """Every setting and its value."""
    values = {name: getattr(settings, name) for name in _SETTINGS}
    return [(name, "default" if value is None else str(value)) for name, value in values.items()]
