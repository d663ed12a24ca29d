"""Times as ollama's users write them."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.serve.keep_alive import FOREVER, keep_alive_seconds, keep_alive_text


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0),
        (90, 90),
        (1.5, 1.5),
        (-1, FOREVER),
        (-0.5, FOREVER),
        ("0", 0),
        ("300", 300),
        ("-1", FOREVER),
        ("-1m", FOREVER),
        ("forever", FOREVER),
        ("Forever", FOREVER),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("300ms", 0.3),
        ("+10s", 10),
        (" 24h ", 86400),
        ("1h2m3s", 3723),
    ],
)
def test_what_it_means(value: Any, seconds: float) -> None:
    assert keep_alive_seconds(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value",
    [None, True, [], {}, "", " ", "m", "5 m", "5x", "1h 3m", "--1", "nan", "9" * 60, float("nan")],
)
def test_what_is_no_time(value: Any) -> None:
    with pytest.raises(ValueError, match="no time"):
        keep_alive_seconds(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (90, "90s"), (300, "5m"), (7200, "2h"), (0.5, "0.5s"), (FOREVER, "forever")],
)
def test_as_text_it_means_the_same(seconds: float, text: str) -> None:
    assert keep_alive_text(seconds) == text
    assert keep_alive_seconds(text) == seconds
