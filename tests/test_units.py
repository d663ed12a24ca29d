"""Sizes as they are shown: never a number that rounds to nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import conmoe_edge
from conmoe_edge.checkpoint.fs.disk import require_space
from conmoe_edge.errors import NoSpace
from conmoe_edge.units import GIB, KIB, MIB, human_size, parse_size, unit_for


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (MIB - 1, "1.0 MiB"),
        (1023 * KIB, "1023.0 KiB"),
        (10 * MIB, "10.0 MiB"),
        (GIB - 1, "1.00 GiB"),
        (8 * 10**9, "7.45 GiB"),
        (5000 * GIB, "5000.00 GiB"),
    ],
)
def test_human_sizes(count: int, text: str) -> None:
    assert human_size(count) == text


@given(st.integers(1, 1 << 50))
def test_a_size_is_near_what_it_says(count: int) -> None:
    said = parse_size(human_size(count))
    assert said is not None and said > 0
    assert abs(said - count) <= 0.05 * count
    assert not re.match(r"0(\.0+)? ", human_size(count))


@given(st.integers(0, 1 << 45), st.integers(1, 1 << 45))
def test_one_unit_for_a_table(count: int, most: int) -> None:
    unit = unit_for(most)
    text = unit.text(min(count, most))
    assert text != unit.text(0) or min(count, most) == 0
    assert len(text.replace(",", "")) <= 9


def test_errors_about_little_say_how_little(tmp_path: Path) -> None:
    with pytest.raises(NoSpace) as full:
        require_space(tmp_path, 1 << 60)
    assert "0.00" not in full.value.why


def test_nobody_writes_sizes_by_hand() -> None:
    """``units.py`` alone knows how a size looks; nothing else divides by a GiB to show it."""
    by_hand = re.compile(r"/ ?(GIB|MIB|KIB|2\*\*\d0|\(1 << \d0\))\b|:\.\df\} ?(GiB|MiB|KiB)\b")
    root = Path(conmoe_edge.__file__).parent
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        if path.name != "units.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if by_hand.search(line)
    ]
    assert found == []
