"""The page of real packages: whole, closed, escaped, and with as many marks as there are slots."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import ConmoeError
from conmoe_edge.report import page as page_module
from conmoe_edge.report.charts import size_axis
from conmoe_edge.report.markup import Markup, tag, text
from conmoe_edge.report.package_summary import (
    PackageSummary,
    memory_terms,
    summarise,
    to_json,
)
from conmoe_edge.report.page import page, write_page
from conmoe_edge.report.style import SCRIPT, STYLE

from .conftest import renamed, without_overview

PACKAGES = ("scoped", "auto", "mixed", "unchanged", "by_hand")
HOSTILE = '</title><script>alert("1")</script><img src=x onerror=y>&amp;\x1b[31m\u202e\ud800'


@pytest.fixture(scope="module")
def facts(request: pytest.FixtureRequest) -> PackageSummary:
    return summarise(request.getfixturevalue(request.param), curves=True)


def tree(html: str) -> ElementTree.Element:
    assert html.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


def marks(root: ElementTree.Element, name: str, class_: str) -> list[ElementTree.Element]:
    return [one for one in root.iter(name) if class_ in one.attrib.get("class", "").split()]


def title(element: ElementTree.Element) -> str:
    return element.findtext("title") or ""


@pytest.mark.parametrize("facts", PACKAGES, indirect=True)
def test_the_page_is_well_formed_and_needs_nothing_else(facts: PackageSummary) -> None:
    html = page(facts)
    root = tree(html)
    names = {one.tag for one in root.iter()}
    assert not names & {"img", "link", "iframe", "object", "embed", "base", "image", "use", "a"}
    for one in root.iter():
        assert not {"src", "href", "srcset", "action", "data"} & set(one.attrib)
        assert not [key for key in one.attrib if key.startswith("on")]
    for word in ("http:", "https:", "//", "url(", "@import", "@font-face", "import("):
        assert word not in html
    assert [one.text for one in root.iter("script")] == [SCRIPT]
    assert [one.text for one in root.iter("style")] == [STYLE]
    assert root.attrib["lang"] == "en"
    viewports = [one for one in root.iter("meta") if one.attrib.get("name") == "viewport"]
    assert "width=device-width" in viewports[0].attrib["content"]


class Balanced(HTMLParser):
    """As a browser reads it: every tag that is opened is closed, in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag == "meta" or self.get_starttag_text() is not None
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        # A browser heeds the slash in SVG, and for tags that never have an end.
        assert "svg" in self.open or tag == "meta"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("facts", PACKAGES, indirect=True)
def test_a_browser_reads_the_same(facts: PackageSummary) -> None:
    parser = Balanced()
    parser.feed(page(facts))
    assert parser.open == []


@pytest.mark.parametrize("facts", ["scoped", "auto", "mixed", "by_hand"], indirect=True)
def test_one_arc_for_every_alias_and_one_cell_for_every_slot(facts: PackageSummary) -> None:
    root = tree(page(facts))
    manifest = load_manifest(facts.folder)
    wanted = {
        f"slot {layer}.{number}: leads to {slot.prototype.layer}.{slot.prototype.expert}"
        for layer, row in manifest.slots.items()
        for number, slot in enumerate(row)
        if slot.prototype is not None and slot.prototype != (layer, number)
    }
    found = [re.split(r"[;]| times| plus", title(one))[0] for one in marks(root, "g", "arc")]
    assert len(found) == len(wanted) and set(found) == wanted
    cells = [one for row in marks(root, "svg", "cells") for one in row.iter("g")]
    assert len(cells) == sum(map(len, manifest.slots.values()))
    drawn = {
        kind: len([box for row in marks(root, "svg", "cells") for box in marks(row, "rect", kind)])
        for kind in facts.counts()
    }
    assert drawn == facts.counts()


@pytest.mark.parametrize("facts", ["scoped"], indirect=True)
def test_arcs_and_cells_say_their_distance_and_weight(facts: PackageSummary) -> None:
    root = tree(page(facts))
    for arc in marks(root, "g", "arc"):
        assert re.search(r"; [\d.]+ % of the weight, .* distance 1\.\d{3}$", title(arc))
    panels = marks(root, "div", "panel")
    assert len(panels) == 3
    for panel in panels:  # two layers of 32 slots each
        assert len(marks(panel, "path", "tick")) == 64
        assert len(marks(panel, "path", "gone")) == 32


@pytest.mark.parametrize("facts", ["mixed"], indirect=True)
def test_the_chart_draws_the_curve(facts: PackageSummary) -> None:
    (line,) = marks(tree(page(facts)), "polyline", "best")
    assert facts.hits is not None and len(facts.hits.layouts) == 2
    curve = facts.hits.all_together
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    for (x, y), nbytes, rate in zip(points, curve.nbytes, curve.best, strict=True):
        assert x == pytest.approx(100 * nbytes / curve.nbytes[-1], abs=0.01)
        assert y == pytest.approx(100 - 100 * rate, abs=0.01)


def said(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


@pytest.mark.parametrize("facts", PACKAGES, indirect=True)
def test_every_chart_has_a_title_of_its_own_and_named_axes(facts: PackageSummary) -> None:
    root = tree(page(facts))
    charts = marks(root, "figure", "chart")
    titles = [one.findtext("figcaption") or "" for one in charts]
    assert all(titles) and len(set(titles)) == len(titles)
    for one in charts:
        across = [said(name) for name in marks(one, "span", "acrossname")]
        assert len(across) == 1 and across[0], titles
        if not marks(one, "svg", "arcs"):  # whose height is no scale
            up = [said(name) for name in marks(one, "span", "upname")]
            assert len(up) == 1 and up[0], titles
    charted = sum(len(list(one.iter("svg"))) for one in charts)
    every = [one for one in root.iter("svg") if "aria-label" in one.attrib]
    tables = [svg for cell in marks(root, "div", "quality") for svg in cell.iter("svg")]
    samples = [svg for one in charts for svg in one.iter("svg") if "aria-hidden" in svg.attrib]
    assert len(every) == charted - len(samples) + len(tables)


@pytest.mark.parametrize("facts", PACKAGES, indirect=True)
def test_figures_of_axes_do_not_cover_each_other(facts: PackageSummary) -> None:
    room = 360 - 2 * 16 - 34 - 5  # pixels of a picture on a phone
    for row in marks(tree(page(facts)), "div", "across"):
        ends = []
        for mark in row.iter("span"):
            at = float(re.findall(r"left:([\d.]+)%", mark.attrib["style"])[0]) / 100 * room
            half = 6.6 * len(mark.text or "") / 2
            ends.append((at - half, at + half))
        for (_, right), (left, _) in itertools.pairwise(ends):
            assert right < left, said(row)


@pytest.mark.parametrize("facts", ["auto", "mixed", "scoped", "by_hand"], indirect=True)
def test_a_bar_is_as_high_as_the_neurons_that_are_kept(facts: PackageSummary) -> None:
    (picture,) = marks(tree(page(facts)), "svg", "kept")
    bars = {title(one): one for one in picture.iter("g")}
    for one in facts.prototypes:
        name = f"expert {one.id.layer}.{one.id.expert}: "
        words, group = next((w, g) for w, g in bars.items() if w.startswith(name))
        assert f"{one.neurons:,} of {one.whole:,} neurons in {one.form}" in words
        (bar,) = marks(group, "rect", "expert")
        assert float(bar.attrib["height"]) == pytest.approx(9 * one.neurons / one.whole, abs=0.01)
    shades = {
        (one.form, marks(group, "rect", "expert")[0].attrib["fill-opacity"])
        for one in facts.prototypes
        for words, group in bars.items()
        if words.startswith(f"expert {one.id.layer}.{one.id.expert}: ")
    }
    assert len(shades) == len({form for form, _ in shades})
    for kind in ("alias", "constant", "dropped"):
        assert len(marks(picture, "rect", kind)) == facts.counts()[kind]


@pytest.mark.parametrize("facts", PACKAGES, indirect=True)
def test_the_header_says_what_the_json_says(facts: PackageSummary) -> None:
    value, root = to_json(facts)["experts"], tree(page(facts))
    tiles = [(one.findtext("dd"), one.findtext("dt") or "") for one in root.iter("div")]
    shown = {figure: word for figure, word in tiles if figure is not None}
    if value is None:
        assert not any("experts kept" in word for word in shown.values())
        return
    assert shown[f"{value['kept']:,} of {value['experts']:,}"].startswith("experts kept")
    if value["removed"] is not None:
        word = "fewer" if value["removed"] >= 0 else "more"
        assert shown[f"{100 * abs(value['removed']):.0f} %"].startswith(f"{word} bytes of experts")


@pytest.mark.parametrize("facts", ["auto", "scoped", "by_hand"], indirect=True)
def test_arcs_are_drawn_where_there_are_any(facts: PackageSummary) -> None:
    panels = marks(tree(page(facts)), "div", "panel")
    assert all(marks(one, "g", "arc") for one in panels)
    assert len(panels) == sum(
        any(slot.kind == "alias" for layer in layers for slot in facts.slots[layer])
        for layers in facts.scopes
    )


@pytest.mark.parametrize("facts", ["auto", "unchanged"], indirect=True)
def test_the_process_stands_apart_from_the_model(facts: PackageSummary) -> None:
    root = tree(page(facts))
    own = next(term for term in memory_terms(facts) if term.process)
    first, second = marks(root, "figure", "chart")[:2]
    assert any(title(g).startswith("the process itself") for g in first.iter("g"))
    assert own.name not in said(second)
    bars = [float(one.attrib["width"]) for one in marks(second, "rect", "t1")]
    assert max(bars) == pytest.approx(100)


def test_a_small_size_is_never_nothing() -> None:
    axis = size_axis("memory", 3 << 20)
    assert "MiB" in axis.name and {label for _, label in axis.ticks} >= {"0", "1", "2", "3"}
    for most in (1, 7, 999, 1023 << 10, 5 << 30, 3 << 40):
        ticks = size_axis("memory", most).ticks
        labels = [label for _, label in ticks]
        assert len(set(labels)) == len(labels) >= 2 and all(0 <= at <= 1 for at, _ in ticks)


@pytest.mark.parametrize("facts", ["scoped"], indirect=True)
def test_shapes_stay_inside_their_pictures(facts: PackageSummary) -> None:
    for svg in tree(page(facts)).iter("svg"):
        wide, high = map(float, svg.attrib["viewBox"].split()[2:])
        for box in svg.iter("rect"):
            x, y, w, h = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
            assert x >= 0 and y >= -0.01 and w >= 0 and h >= 0
            assert x + w <= wide + 0.01 and y + h <= high + 0.01
        for path in svg.iter("path"):
            assert "nan" not in path.attrib["d"]


@pytest.mark.parametrize("facts", ["scoped", "auto"], indirect=True)
def test_arcs_stand_on_their_slots_and_stay_below_the_edge(facts: PackageSummary) -> None:
    for arc in marks(tree(page(facts)), "path", "line"):
        numbers = [float(one) for one in re.findall(r"-?[\d.]+", arc.attrib["d"])]
        x0, y0, x1, top, x2, other, x3, y3 = numbers
        assert (x0, x3) == (x1, x2) and x0 % 1 == x3 % 1 == 0.5 and x0 != x3
        assert y0 == y3 == 92 and top == other
        # The top of such a curve is three quarters of the way to its control points.
        assert 0 <= y0 - 0.75 * (y0 - top) < y0


def test_a_hostile_name_is_only_a_name(scoped: Path, tmp_path: Path) -> None:
    # Half a character cannot even be written into a manifest.
    name = HOSTILE.replace("\ud800", "")
    root = tree(page(summarise(renamed(scoped, tmp_path / "hostile", name))))
    shown = name.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert root.findtext(".//h1") == shown
    assert len(list(root.iter("script"))) == 1 and not list(root.iter("img"))


@pytest.mark.parametrize("facts", ["scoped"], indirect=True)
def test_hostile_texts_anywhere_else(facts: PackageSummary) -> None:
    manifest = facts.manifest
    evil = replace(
        manifest,
        method=HOSTILE,
        tool_version=HOSTILE,
        source={"name": HOSTILE, "revision": HOSTILE},
        receipt={
            **manifest.receipt,
            "per_domain": {HOSTILE: manifest.receipt, "odd": 7},
            "kl": "x",
        },
    )
    root = tree(page(replace(facts, manifest=evil, model_type=HOSTILE)))
    assert len(list(root.iter("script"))) == 1 and not list(root.iter("img"))


def test_text_is_escaped_unless_it_is_markup() -> None:
    assert tag("p", "a<b", Markup("<i>c</i>"), title='"') == '<p title="&quot;">a&lt;b<i>c</i></p>'
    assert text("\x00\ud800") == "\N{REPLACEMENT CHARACTER}" * 2
    assert tag("rect", x=0.5, y=2.0, fill_opacity=1 / 3, class_=None) == (
        '<rect x="0.5" y="2" fill-opacity="0.333"/>'
    )


def test_an_older_package_has_its_page_as_well(scoped: Path, tmp_path: Path) -> None:
    html = page(summarise(without_overview(scoped, tmp_path / "old")))
    assert "the router chose it in the package" in html
    assert "distance" not in " ".join(title(one) for one in marks(tree(html), "g", "arc"))


@pytest.mark.parametrize("facts", ["scoped"], indirect=True)
def test_the_page_is_written_whole_or_not_at_all(
    facts: PackageSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_page(facts, path)
    before = path.read_bytes()
    assert before.decode() == page(facts)
    with pytest.raises(ConmoeError, match="Cannot write"):
        write_page(facts, tmp_path / "no" / "such" / "report.html")

    def broken(facts: PackageSummary) -> str:
        raise MemoryError

    monkeypatch.setattr(page_module, "page", broken)
    with pytest.raises(MemoryError):
        write_page(facts, path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
