"""``bench`` as a table and as a picture."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from xml.etree import ElementTree

from bench_reports import BUDGET, report_of
from rich.console import Console
from svg_texts import SPACE, covered, outside, text_boxes

from conmoe_edge.api.bench_report import BenchReport
from conmoe_edge.cli.views.bench_svg import bench_svg
from conmoe_edge.cli.views.bench_table import bench_view


def _shown(report: BenchReport) -> str:
    console = Console(file=StringIO(), width=80, markup=False, emoji=False, highlight=False)
    console.print(bench_view(report))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_what_could_not_be_measured_is_a_question_mark() -> None:
    assert "?" in _shown(report_of(budget=replace(BUDGET, device_bandwidth=None), expected=None))


def test_the_fast_path_has_a_line_where_it_is_known() -> None:
    assert "Tokens" not in _shown(report_of())
    assert "Tokens   native, 3 of 3 layers" in _shown(report_of(fast_path="native, 3 of 3 layers"))


def test_the_table_fits_80_columns() -> None:
    shown = _shown(report_of())
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert "2.5  (2.0–4.0)" in shown and "65.0 %" in shown
    assert "brought from host" not in shown
    on_gpu = report_of(budget=replace(BUDGET, device="cuda"))
    assert "brought from host" in _shown(on_gpu)


def test_the_picture_is_whole_and_holds_no_foreign_thing() -> None:
    for report in (report_of(), report_of(budget=replace(BUDGET, disk_bandwidth=None))):
        svg = bench_svg(report)
        root = ElementTree.fromstring(svg)
        assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "<script" not in svg and "url(" not in svg
        width = float(root.attrib["width"])
        for one in root.iter("{http://www.w3.org/2000/svg}rect"):
            left, wide = float(one.attrib.get("x", 0)), float(one.attrib["width"])
            assert left >= 0 and wide >= 0 and left + wide <= width


def test_names_cannot_break_the_picture() -> None:
    report = report_of(runtime={"kernel": "<script>&", "policy": "", "reads": ""})
    assert "<script>" not in bench_svg(report)


def test_nothing_has_an_empty_bar_and_every_axis_has_a_name() -> None:
    usual = report_of()
    idle = {"disk_bytes": 0.0, "host_bytes": 0.0, "waited_share": 0.0, "waited_seconds": 0.0}
    still = replace(
        usual,
        decode=replace(usual.decode, **idle),
        prefill=replace(usual.prefill, **idle, bound=None),
    )
    nothing = replace(still, decode=replace(still.decode, memory_bytes=None, bound=None))
    long = report_of(package={**usual.facts.package, "path": "/very/long" * 12})
    for report in (usual, still, nothing, long):
        svg = bench_svg(report)
        assert covered(svg) == [] and outside(svg) == []
        boxes = [
            one.attrib
            for one in ElementTree.fromstring(svg).iter(f"{SPACE}rect")
            if one.get("height") == "18"
        ]
        # Behind every rail comes what is drawn on it.
        rails = [at for at, one in enumerate(boxes) if one["class"] == "rail"]
        assert all(boxes[at + 1]["class"] != "rail" for at in rails)
        assert all(float(one["width"]) > 0 for one in boxes)
        words = [text for text, _ in text_boxes(svg)]
        heads = [one for one in words if one.startswith(("Speed", "Where the", "What the"))]
        assert sum(one.endswith((" (%)", "iB)")) for one in words) >= len(heads) - 1
    assert "Where the bytes" not in bench_svg(nothing)
    assert "waiting for experts" in bench_svg(usual) and "waiting" not in bench_svg(still)
