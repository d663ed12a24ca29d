"""The prototypes by the weight they carry, and the distances of the slots that share them."""

from __future__ import annotations

from conmoe_edge.report.charts import chart, count_axis, number_axis
from conmoe_edge.report.experts_section import prototype_words
from conmoe_edge.report.markup import Markup, figure, stretched, table, tag
from conmoe_edge.report.package_summary import PackageSummary
from conmoe_edge.report.slot_shares import PrototypeFact, quantile

_SHOWN = 6
_BINS = 24


def prototypes(facts: PackageSummary) -> Markup:
    """The whole section; nothing where there are none."""
    ranked = facts.busiest(len(facts.prototypes))
    if not ranked:
        return Markup("")
    shown = min(_SHOWN, len(ranked) // 2)
    parts = [_ranking(ranked)]
    if shown:
        parts.append(
            tag(
                "div",
                _list("Busiest", facts.busiest(shown), len(ranked)),
                _list("Loneliest", facts.loneliest(shown), len(ranked)),
                class_="pair",
            )
        )
    if len(facts.distances) > 1 and facts.distances[-1] > facts.distances[0]:
        parts.append(_histogram(facts))
    half = _until_half(ranked)
    lead = f"{len(ranked):,} prototypes answer for {len(facts.every_slot):,} router slots. "
    if ranked[0].weight > 0:
        lead += f"The busiest {half:,} of them carry half of the routing weight."
    return figure(
        "Busy and lonely prototypes",
        *parts,
        lead=lead,
        tip="Point at a bar, or tap it.",
        id_="prototypes",
    )


def _until_half(ranked: tuple[PrototypeFact, ...]) -> int:
    half, carried = sum(one.weight for one in ranked) / 2, 0.0
    for number, one in enumerate(ranked, start=1):
        carried += one.weight
        if carried >= half:
            return number
    return len(ranked)


def _ranking(ranked: tuple[PrototypeFact, ...]) -> Markup:
    most = ranked[0].weight or 1.0
    bars = []
    for number, one in enumerate(ranked):
        height = 100.0 * one.weight / most
        bar = tag(
            "rect", x=number + 0.08, y=100.0 - height, width=0.84, height=height, class_="weight"
        )
        hit = tag("rect", x=float(number), y=0.0, width=1.0, height=100.0, class_="hit")
        bars.append(tag("g", tag("title", prototype_words(one)), bar, hit))
    equal = 100.0 - 100.0 * min(1.0, sum(p.weight for p in ranked) / len(ranked) / most)
    bars.append(tag("path", d=f"M0 {equal:.2f}H{len(ranked)}", class_="equal"))
    picture = stretched(
        *bars, wide=len(ranked), high=100.0, label="weight by prototype", class_="ranking"
    )
    return chart(
        "Routing weight of every prototype, the busiest first",
        picture,
        across=count_axis("prototypes", len(ranked)),
        up=number_axis("share of all routing weight (%)", 100 * most),
        note="Dashed: an equal share.",
    )


def _list(title: str, chosen: tuple[PrototypeFact, ...], count: int) -> Markup:
    rows: list[tuple[str, ...]] = [
        (
            f"{one.id.layer}.{one.id.expert}",
            f"{one.slots:,}",
            "–".join(str(n) for n in dict.fromkeys((one.layers[0], one.layers[-1])))
            if one.layers
            else "–",
            f"{100 * one.weight:.2f} %",
            f"×{one.weight * count:.2f}",
            one.short_form + (f", {one.neurons:,}" if one.narrower else ""),
        )
        for one in chosen
    ]
    headers = (title, "slots", "of layers", "weight", "of equal", "form, neurons")
    return table(headers, rows, frozenset({4}))


def _histogram(facts: PackageSummary) -> Markup:
    distances = facts.distances
    low, high = distances[0], distances[-1]
    counts = [0] * _BINS
    for one in distances:
        counts[min(_BINS - 1, int((one - low) / (high - low) * _BINS))] += 1
    bars = []
    for number, count in enumerate(counts):
        height = 100.0 * count / max(counts)
        edges = [low + (high - low) * (number + more) / _BINS for more in (0, 1)]
        bar = tag(
            "rect", x=number + 0.04, y=100.0 - height, width=0.92, height=height, class_="weight"
        )
        hit = tag("rect", x=float(number), y=0.0, width=1.0, height=100.0, class_="hit")
        slots = f"{count} slot{'' if count == 1 else 's'}"
        label = f"{slots} at a distance of {edges[0]:.4f} to {edges[1]:.4f}"
        bars.append(tag("g", tag("title", label), bar, hit))
    picture = stretched(*bars, wide=_BINS, high=100.0, label="distances", class_="ranking")
    return chart(
        "Distance from a slot's expert to its prototype",
        picture,
        across=number_axis("distance (0 is the same expert, 1.414 two unrelated ones)", high, low),
        up=number_axis("router slots", max(counts)),
        note=f"Median {quantile(distances, 0.5):.3f}.",
    )
