"""Draw the pictures of the documents again from the results that are recorded: nothing is measured.

    python -m benchmarks.plots

Reads ``results/{compare,frontier,quality}.json`` and writes the ``.svg`` beside each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import frontier_plot, quality_plot
from benchmarks.comparison import plot as compare_plot
from benchmarks.comparison.report import Row
from benchmarks.frontier_report import points_of
from benchmarks.quality_report import Cell
from conmoe_edge.units import parse_size

RESULTS = Path(__file__).resolve().parent / "results"


def compare_svg(data: Mapping[str, Any]) -> str:
    """Of a result of ``compare.py``."""
    rows = [Row(**{**row, "cap": _cap(row["cap"])}) for row in data["rows"]]
    prompt = data["settings"]["prompt_tokens"]
    cores = data["machine"]["cores"]
    where = f"OLMoE-1B-7B's shape on {cores} CPU cores, after a prompt of {prompt} tokens"
    return compare_plot.plot(rows, where)


def frontier_svg(data: Mapping[str, Any]) -> str:
    """Of a result of ``frontier.py``."""
    tokens = data["tokens"]
    where = f"{_model(data)}, {tokens:,} held-out tokens; whiskers: lowest and highest seed"
    return frontier_plot.plot(points_of(data), where)


def quality_svg(data: Mapping[str, Any]) -> str:
    """Of a result of ``quality.py``."""
    cells = [Cell.of(key, row) for key, row in data["cells"].items() if "refused" not in row]
    where = f"{_model(data)}; every method in its best scope; whiskers: lowest and highest seed"
    return quality_plot.plot(cells, where)


DRAWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "compare": compare_svg,
    "frontier": frontier_svg,
    "quality": quality_svg,
}


def main(words: Sequence[str] | None = None) -> int:
    """Every picture whose result is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: results)")
    folder = parser.parse_args(words).results
    for name, draw in DRAWN.items():
        source = folder / f"{name}.json"
        if source.is_file():
            data = json.loads(source.read_text(encoding="utf-8"))
            (folder / f"{name}.svg").write_text(draw(data), encoding="utf-8")
            print(folder / f"{name}.svg")
    return 0


def _cap(name: str) -> int | None:
    return None if name == "none" else parse_size(name)


def _model(data: Mapping[str, Any]) -> str:
    name = str(data["model"])
    return f"the {name} model" if name == "demo" else name


if __name__ == "__main__":
    raise SystemExit(main())
