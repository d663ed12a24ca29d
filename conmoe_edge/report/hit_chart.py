"""Hit rate by cache slots: one chart a record layout, the policies side by side."""

from __future__ import annotations

from conmoe_edge.report.hits import HitCurve
from conmoe_edge.report.markup import Markup, figure, join, key, stretched, table, tag
from conmoe_edge.report.package_summary import PackageSummary

_FULL = 100.0


def hit_charts(facts: PackageSummary) -> Markup:
    """The whole section; nothing where there is no trace."""
    if not facts.curves:
        return Markup("")
    parts = []
    for curve in facts.curves:
        if len(facts.curves) > 1:
            parts.append(tag("h3", f"{curve.precision} records"))
        parts.append(_chart(curve))
    return figure(
        "How many hits a smaller cache would have",
        *parts,
        lead="The package's own routing trace, replayed through the cache policies of the runtime: the share of "
        "requests that find their prototype in memory. What a policy adapts to is the first half of the trace, "
        "what is counted the second.",
        tip="Point at a dot, or tap it.",
        id_="cache",
    )


def _chart(curve: HitCurve) -> Markup:
    def x(slots: float) -> float:
        return _FULL * slots / curve.prototypes

    def line(rates: tuple[float, ...], class_: str) -> Markup:
        points = " ".join(
            f"{x(s):.2f},{_FULL - _FULL * r:.2f}" for s, r in zip(curve.slots, rates, strict=True)
        )
        return tag("polyline", points=points, class_=class_)

    shapes = [tag("path", d=f"M0 {level}H100", class_="grid") for level in (0, 25, 50, 75, 100)]
    if curve.planned is not None and curve.planned < curve.prototypes:
        shapes.append(tag("path", d=f"M{x(curve.planned):.2f} 0V100", class_="planned"))
    shapes += [line(rates, f"policy p{n}") for n, rates in enumerate(curve.rates.values())]
    shapes.append(line(curve.best, "best"))
    for column, slots in enumerate(curve.slots):
        best = curve.best[column]
        names = [name for name, rates in curve.rates.items() if rates[column] == best]
        said = f"{slots:,} slots: {100 * best:.1f} % hits" + (
            f" with {names[0]}" if slots < curve.prototypes else ", every prototype resident"
        )
        dot = tag("path", d=f"M{x(slots):.2f} {_FULL - _FULL * best:.2f}h0", class_="dot")
        shapes.append(tag("g", tag("title", said), dot))
    axis = [tag("span", f"{level} %") for level in (100, 75, 50, 25, 0)]
    places = [0, curve.prototypes // 4, curve.prototypes // 2, 3 * curve.prototypes // 4]
    marks = [tag("span", f"{n:,}", style=f"left:{x(n):.2f}%") for n in dict.fromkeys(places)]
    marks.append(tag("span", f"{curve.prototypes:,} slots", class_="last"))
    samples = [(_line_sample("best"), "the best of them")]
    samples += [(_line_sample(f"policy p{n}"), name) for n, name in enumerate(curve.rates)]
    if curve.planned is not None and curve.planned < curve.prototypes:
        samples.append((_line_sample("planned", "M20 1V19"), f"planned: {curve.planned:,} slots"))
    headers = ("slots", *curve.rates)
    rows: list[tuple[str, ...]] = [
        (f"{slots:,}", *(f"{100 * rates[n]:.1f} %" for rates in curve.rates.values()))
        for n, slots in enumerate(curve.slots)
    ]
    return join(
        key("", *samples),
        tag(
            "div",
            tag("div", *axis, class_="axis"),
            stretched(*shapes, wide=_FULL, high=_FULL, label="hit rate by slots", class_="chart"),
            tag("span", *marks, class_="ticks"),
            class_="plot",
        ),
        tag(
            "details",
            tag("summary", "As a table"),
            tag("div", table(headers, rows), class_="scroll"),
        ),
    )


def _line_sample(class_: str, line: str = "M1 10H39") -> Markup:
    return tag(
        "svg",
        tag("path", d=line, class_=class_),
        class_="sample long",
        viewBox="0 0 40 20",
        aria_hidden="true",
    )
