"""Hit rate by the memory for prototypes: one chart for the whole package, the policies side by side."""

from __future__ import annotations

from conmoe_edge.report.charts import chart, number_axis, size_axis
from conmoe_edge.report.hits import CacheCurve
from conmoe_edge.report.markup import Markup, figure, key, stretched, table, tag
from conmoe_edge.report.package_summary import PackageSummary
from conmoe_edge.units import human_size

_FULL = 100.0


def hit_chart(facts: PackageSummary) -> Markup:
    """The whole section; nothing where there is no trace."""
    if facts.hits is None:
        return Markup("")
    curve, layouts = facts.hits.all_together, len(facts.manifest.layouts)
    lead = (
        "The package's own routing trace, replayed through the cache policies of the runtime: the share of "
        "requests that find their prototype in memory. What a policy adapts to is the first half of the trace, "
        "what is counted the second."
    )
    if layouts > 1:
        lead += f" Each of the {layouts:,} sizes of records gets the same share of slots."
    return figure(
        "How many hits a smaller cache would have",
        _chart(curve),
        _legend(curve),
        _table(curve),
        lead=lead,
        tip="Point at a dot, or tap it.",
        id_="cache",
    )


def _chart(curve: CacheCurve) -> Markup:
    most = curve.nbytes[-1]

    def x(nbytes: float) -> float:
        return _FULL * nbytes / most

    def line(rates: tuple[float, ...], class_: str) -> Markup:
        points = " ".join(
            f"{x(n):.2f},{_FULL - _FULL * r:.2f}" for n, r in zip(curve.nbytes, rates, strict=True)
        )
        return tag("polyline", points=points, class_=class_)

    shapes = [tag("path", d=f"M0 {level}H100", class_="grid") for level in (0, 20, 40, 60, 80, 100)]
    at = _planned(curve)
    if at is not None:
        shapes.append(tag("path", d=f"M{x(curve.nbytes[at]):.2f} 0V100", class_="planned"))
    shapes += [line(rates, f"policy p{n}") for n, rates in enumerate(curve.rates.values())]
    shapes.append(line(curve.best, "best"))
    for slots, nbytes, best in zip(curve.slots, curve.nbytes, curve.best, strict=True):
        said = f"{human_size(nbytes)}, {slots:,} slots: {_FULL * best:.1f} % hits"
        said += ", every prototype resident" if slots == curve.slots[-1] else ""
        dot = tag("path", d=f"M{x(nbytes):.2f} {_FULL - _FULL * best:.2f}h0", class_="dot")
        shapes.append(tag("g", tag("title", said), dot))
    return chart(
        "Hits by the memory for prototypes",
        stretched(*shapes, wide=_FULL, high=_FULL, label="hits by memory", class_="lines"),
        across=size_axis("memory for prototypes", most),
        up=number_axis("hits (% of requests)", _FULL),
    )


def _planned(curve: CacheCurve) -> int | None:
    """Which point the package was planned for; ``None`` where that is not known or all are resident."""
    if curve.planned is None or curve.planned >= curve.slots[-1]:
        return None
    return curve.slots.index(curve.planned) if curve.planned in curve.slots else None


def _legend(curve: CacheCurve) -> Markup:
    samples = [(_line_sample("best"), "the best of them")]
    samples += [(_line_sample(f"policy p{n}"), name) for n, name in enumerate(curve.rates)]
    at = _planned(curve)
    if at is not None:
        word = f"planned: {curve.slots[at]:,} slots, {human_size(curve.nbytes[at])}"
        samples.append((_line_sample("planned", "M20 1V19"), word))
    return key("", *samples)


def _table(curve: CacheCurve) -> Markup:
    rows: list[tuple[str, ...]] = [
        (
            human_size(curve.nbytes[n]),
            f"{slots:,}",
            *(f"{_FULL * rates[n]:.1f} %" for rates in curve.rates.values()),
        )
        for n, slots in enumerate(curve.slots)
    ]
    shown = table(("memory", "slots", *curve.rates), rows)
    return tag("details", tag("summary", "As a table"), tag("div", shown, class_="scroll"))


def _line_sample(class_: str, line: str = "M1 10H39") -> Markup:
    return tag(
        "svg",
        tag("path", d=line, class_=class_),
        class_="sample long",
        viewBox="0 0 40 20",
        aria_hidden="true",
    )
