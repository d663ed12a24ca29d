"""The pictures of the documents: drawn from the recorded results, named axes, texts beside each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from svg_texts import SPACE, covered, outside, text_boxes

from benchmarks import plots
from benchmarks.comparison.arms import SYSTEMS
from benchmarks.picture import Places

NAMES = tuple(plots.DRAWN)


def recorded(name: str) -> dict[str, Any]:
    return json.loads((plots.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_what_the_recorded_result_gives(name: str) -> None:
    drawn = (plots.RESULTS / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == plots.DRAWN[name](recorded(name)), "run: python -m benchmarks.plots"


@pytest.mark.parametrize("name", NAMES)
def test_axes_have_names_and_texts_do_not_cover_each_other(name: str) -> None:
    svg = plots.DRAWN[name](recorded(name))
    assert covered(svg) == [] and outside(svg) == []
    classes = [one.get("class", "").split() for one in ElementTree.fromstring(svg).iter()]
    assert sum("x-axis" in one for one in classes) == 1
    # Of rows of names the axis up has none.
    assert sum("y-axis" in one for one in classes) == (0 if name == "compare" else 1)
    assert sum("title" in one for one in classes) == 1


@pytest.mark.parametrize("name", NAMES)
def test_both_grounds_have_colours_of_their_own(name: str) -> None:
    svg = plots.DRAWN[name](recorded(name))
    light, _, dark = svg.partition("prefers-color-scheme: dark")
    for kind in set(re.findall(r"\.(own|peer|other) \{ --c", light)):
        assert re.search(rf"\.{kind} {{ --c: #\w+ }}", dark)


def test_every_figure_of_the_comparison_stands_beside_its_name() -> None:
    data = recorded("compare")
    texts = [text for text, _ in text_boxes(plots.compare_svg(data))]
    for row in data["rows"]:
        if row["speed"]:
            figure = f"{row['speed']:.2f}" if row["speed"] < 1 else f"{row['speed']:.1f}"
            name = SYSTEMS[row["system"]].label.split(",")[0].split(" rate")[0]
            assert figure in texts and any(text.startswith(name) for text in texts)
    assert "polyline" not in plots.compare_svg(data)


def test_other_methods_are_grey_and_ours_is_not() -> None:
    root = ElementTree.fromstring(plots.quality_svg(recorded("quality")))
    kinds = [one.get("class", "").split() for one in root.iter(f"{SPACE}polyline")]
    lines = [one for one in kinds if "line" in one]
    assert sum("own" in one for one in lines) == 1
    assert sum("other" in one for one in lines) == len(lines) - 1 == 13


def test_the_command_draws_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = plots.RESULTS / "frontier.json"
    (tmp_path / "frontier.json").write_bytes(source.read_bytes())
    assert plots.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'frontier.svg'}\n"
    assert (tmp_path / "frontier.svg").read_text() == (plots.RESULTS / "frontier.svg").read_text()


def test_names_go_where_nothing_is() -> None:
    places = Places()
    places.dot(100, 300)
    first = places.name(100, 300, "one")
    assert first == (108, 294, "start")
    assert places.name(100, 300, "two") != first
    places.path([(0, 200), (200, 200)])
    _, base, _ = places.name(100, 200, "three")
    assert abs(base - 200) >= 4
