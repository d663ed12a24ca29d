"""The page about a package: one self-contained HTML file.

Everything in it comes from ``PackageSummary`` and is escaped; there is no reference to anything outside. Written whole
or not at all. Peak memory: the page, some 300 bytes a router slot.
"""

from __future__ import annotations

from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import write_bytes
from conmoe_edge.report.arcs import arcs
from conmoe_edge.report.experts_section import experts
from conmoe_edge.report.heat_map import heat_map
from conmoe_edge.report.hit_chart import hit_chart
from conmoe_edge.report.markup import Markup, join, table, tag
from conmoe_edge.report.memory_bars import memory_bars
from conmoe_edge.report.package_summary import PackageSummary
from conmoe_edge.report.prototypes_section import prototypes
from conmoe_edge.report.quality_section import quality
from conmoe_edge.report.reduction import and_list
from conmoe_edge.report.style import SCRIPT, STYLE
from conmoe_edge.units import human_size

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(facts: PackageSummary, path: Path) -> None:
    """Put the page where ``path`` is.

    Raises:
        ConmoeError, NoSpace: it cannot be written; what was there stays.
    """
    write_bytes(path, page(facts).encode(), "--html FILE in another folder")


def page(facts: PackageSummary) -> str:
    """The whole file."""
    sections = [memory_bars(facts)]
    if facts.unchanged:
        sections.append(
            tag(
                "section",
                tag("h2", "The experts"),
                tag("p", "The model fits as it is: every expert is what it was.", class_="lead"),
            )
        )
    elif facts.slots:
        sections += [
            quality(facts),
            experts(facts),
            heat_map(facts),
            arcs(facts),
            prototypes(facts),
            hit_chart(facts),
        ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{facts.name}: what was done to the experts"),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body",
        _header(facts),
        tag("main", *sections, _files(facts)),
        _footer(facts),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _header(facts: PackageSummary) -> Markup:
    manifest = facts.manifest
    parts = [facts.model_type] if facts.model_type else []
    if facts.slots:
        parts.append(f"{len(facts.slots)} MoE layers")
    if facts.top_k:
        parts.append(f"top-{facts.top_k}")
    if facts.unchanged:
        parts.append("left as it is")
    else:
        parts.append(f"method {manifest.method}")
        if manifest.scope > 1:
            parts.append(f"prototypes shared by {manifest.scope} layers")
        forms = list(dict.fromkeys(one.form for one in facts.prototypes))
        if forms:
            parts.append(f"experts in {and_list(sorted(forms))}")
    if manifest.dense_precision != "source":
        parts.append(f"dense weights in {manifest.dense_precision}")
    if manifest.kv_precision != "source":
        parts.append(f"keys and values in {manifest.kv_precision}")
    tiles = [tag("div", tag("dt", word), tag("dd", figure)) for figure, word in _figures(facts)]
    return tag(
        "header",
        tag("h1", facts.name),
        tag("p", " · ".join(parts), class_="sub"),
        tag("dl", *tiles, class_="facts"),
    )


def _figures(facts: PackageSummary) -> list[tuple[str, str]]:
    """The few numbers that a reader wants first."""
    manifest, sizes = facts.manifest, facts.sizes
    total = human_size(sizes.dense + sizes.prototypes)
    figures = []
    left = facts.reduction
    if left.experts:
        narrower = f", {left.narrower:,} of them narrower" if left.narrower else ""
        figures.append((f"{left.kept:,} of {left.experts:,}", f"experts kept{narrower}"))
    if left.removed is not None and left.bytes_before is not None:
        change = "fewer" if left.removed >= 0 else "more"
        was, now = human_size(left.bytes_before), human_size(left.bytes_now)
        figures.append(
            (f"{100 * abs(left.removed):.0f} %", f"{change} bytes of experts, {was} to {now}")
        )
    planned = "" if facts.plan is None else f", {human_size(facts.plan.disk_bytes)} planned"
    figures.append((total, f"of weights on disk{planned}"))
    ratio, same = (manifest.receipt.get(key) for key in ("perplexity_ratio", "top1_agreement"))
    if isinstance(ratio, int | float):
        figures.append((f"×{ratio:.3f}", "perplexity on held-out text"))
    if isinstance(same, int | float):
        figures.append((f"{100 * same:.1f} %", "same most likely token"))
    speed = None if facts.plan is None else facts.plan.chosen.tokens_per_second
    if facts.measured is not None:
        expected = "" if speed is None else f", {speed:.0f} expected"
        reached = facts.measured.decode.tokens_per_second.median
        figures.append((f"{reached:.1f} tok/s", f"measured{expected}"))
    elif speed is not None:
        figures.append((f"~{speed:.0f} tok/s", "expected by the plan"))
    return figures


def _files(facts: PackageSummary) -> Markup:
    manifest = facts.manifest
    rows: list[tuple[str, ...]] = [
        (name, human_size(entry["size"]), tag("code", entry["sha256"][:16]))
        for name, entry in sorted(manifest.files.items())
    ]
    checked = (
        "Every file was hashed, and is what the manifest says."
        if facts.verified
        else ("Every file is there in full; conmoe-edge inspect --verify hashes them.")
    )
    revision = manifest.source.get("revision")
    origin = [f"Made from {facts.name}"]
    origin.append(f" at revision {revision}" if revision else "")
    origin.append(f" by conmoe-edge {manifest.tool_version}." if manifest.tool_version else ".")
    return tag(
        "section",
        tag("h2", "Files"),
        tag("p", "".join(origin) + " " + checked, class_="lead"),
        tag(
            "details",
            tag("summary", f"{len(rows)} files"),
            tag("div", table(("file", "size", "SHA-256 begins"), rows), class_="scroll"),
        ),
        id="files",
    )


def _footer(facts: PackageSummary) -> Markup:
    return tag("footer", join("Made by ", tag("code", "conmoe-edge inspect --html"), "."))
