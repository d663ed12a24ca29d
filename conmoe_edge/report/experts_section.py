"""What is left of every expert, and the bytes of each layer beside what it was measured to be worth.

A row a layer, a bar an expert: its height is the share of the neurons that it keeps, its shade the bits of a weight.
What stands in for an expert that went is a mark at the foot.
"""

from __future__ import annotations

from collections.abc import Sequence

from conmoe_edge.report.charts import chart, count_axis, number_axis, rows_axis, size_axis
from conmoe_edge.report.heat_map import describe
from conmoe_edge.report.markup import Markup, figure, join, key, stretched, tag
from conmoe_edge.report.package_summary import PackageSummary
from conmoe_edge.report.reduction import reduction_words
from conmoe_edge.report.slot_shares import PrototypeFact, SlotFact
from conmoe_edge.units import human_size

_ROW = 10.0
_HIGH = 9.0  # of a whole expert in its row
_FULL = 100.0
_MARK = 1.6
_FAINT = 0.3
"""Opacity of the fewest bits; the most have 1."""


def experts(facts: PackageSummary) -> Markup:
    """The whole section; nothing without experts."""
    if not facts.slots:
        return Markup("")
    said = ". ".join(one[0].upper() + one[1:] for one in reduction_words(facts.reduction))
    return figure(
        "What is left of every expert",
        _every_expert(facts),
        _every_layer(facts),
        lead=f"{said}." if said else "",
        tip="Point at a bar, or tap it.",
        id_="experts",
    )


def _every_expert(facts: PackageSummary) -> Markup:
    forms = _forms(facts.prototypes)
    by_id = {one.id: one for one in facts.prototypes}
    widest = max((one.neurons for one in facts.prototypes), default=0)
    longest = max(map(len, facts.slots.values()))
    shapes = []
    for number, row in enumerate(facts.slots.values()):
        top = _ROW * number
        box = {"width": float(len(row)), "height": _HIGH, "class_": "rail"}
        shapes.append(tag("rect", x=0.0, y=top + _ROW - _HIGH, **box))
        shapes += [_expert(slot, by_id.get(slot.id), top, widest, forms) for slot in row]
    counts = facts.counts()
    gone = [
        (kind, word)
        for kind, word in (
            ("alias", "gone, another stands in"),
            ("constant", "gone, a constant stands in"),
            ("dropped", "gone, nothing stands in"),
        )
        if counts[kind]
    ]
    picture = stretched(
        *shapes,
        wide=float(longest),
        high=_ROW * len(facts.slots),
        label="neurons and bits of every expert",
        class_="kept",
    )
    full = max([widest, *(one.whole for one in facts.prototypes)], default=0)
    height = "a bar as high as its row has all neurons of the expert"
    if full and all(one.whole for one in facts.prototypes):
        height = f"a bar as high as its row has all {full:,} neurons of the expert"
    elif full:
        height = f"a bar as high as its row has {full:,} neurons, the most that there are"
    return join(
        chart(
            "Neurons and bits of every expert",
            tag("div", picture, style=f"height:{_pixels(len(facts.slots), 40)}px"),
            across=count_axis("number of the expert in its layer", longest),
            up=rows_axis("layer", [str(layer) for layer in facts.slots]),
            note=f"A row is a layer; {height}. The stronger its colour, the more bits.",
            least=max(300, 60 + 5 * longest),
        ),
        tag(
            "div",
            key("Bits a weight", *_shades(facts.prototypes, forms)),
            key("At the foot", *((_foot(kind), word) for kind, word in gone)),
            class_="keys",
        ),
    )


def _expert(
    slot: SlotFact,
    kept: PrototypeFact | None,
    top: float,
    widest: int,
    forms: dict[str, float],
) -> Markup:
    left, foot = float(slot.id.expert), top + _ROW
    hit = tag("rect", x=left, y=top, width=1.0, height=_ROW, class_="hit")
    if kept is None:
        mark = {"alias": _MARK, "constant": _MARK / 2, "dropped": _MARK / 4}.get(slot.kind, 0.0)
        sign = tag("rect", x=left + 0.1, y=foot - mark, width=0.8, height=mark, class_=slot.kind)
        return tag("g", tag("title", describe(slot)), sign, hit)
    share = kept.neurons / (kept.whole or widest) if kept.neurons else 1.0
    height = _HIGH * min(1.0, share)
    bar = tag(
        "rect",
        x=left + 0.1,
        y=foot - height,
        width=0.8,
        height=height,
        class_="expert",
        fill_opacity=forms[kept.form],
    )
    return tag("g", tag("title", prototype_words(kept)), bar, hit)


def prototype_words(one: PrototypeFact) -> str:
    """``expert 3.7: 48 of 96 neurons in q3, 3.4 bits a weight, 12.3 KiB; ...``."""
    parts = []
    if one.neurons:
        parts.append(
            f"{one.neurons:,} of {one.whole:,} neurons" if one.whole else f"{one.neurons:,} neurons"
        )
    parts.append(f"in {one.form}")
    said = f"expert {one.id.layer}.{one.id.expert}: {' '.join(parts)}"
    if one.bits is not None:
        said += f", {one.bits:.2f} bits a weight"
    slots = f"{one.slots:,} slot{'' if one.slots == 1 else 's'}"
    said += f", {human_size(one.nbytes)}; {slots} of layer {_layers(one)}"
    return f"{said}, {100 * one.weight:.2f} % of the routing weight"


def _layers(one: PrototypeFact) -> str:
    return ", ".join(map(str, one.layers)) or "none"


def _every_layer(facts: PackageSummary) -> Markup:
    """Two charts side by side, or one where no worth was measured."""
    layers = list(facts.layers.values())
    before = [one.bytes_before for one in layers]
    most = max(max(one.nbytes for one in layers), *(size or 0 for size in before), 1)
    bars = []
    for number, one in enumerate(layers):
        said = f"layer {one.layer}: {one.prototypes:,} of {one.experts:,} experts, "
        said += human_size(one.nbytes)
        if one.bytes_before:
            said += f" of {human_size(one.bytes_before)}"
        bars.append(_bar(number, (one.bytes_before or 0) / most, "rail", said))
        bars.append(_bar(number, one.nbytes / most, "t1", said))
    labels = [str(one.layer) for one in layers]
    known = any(before)
    charts = [
        chart(
            "Bytes of the experts, layer by layer",
            _rows(bars, len(layers), "bytes by layer"),
            across=size_axis("experts on disk", most),
            up=rows_axis("layer", labels),
            note="Pale: what they were in the checkpoint." if known else "",
        )
    ]
    if all(one.worth is not None for one in layers) and layers:
        highest = max(one.worth or 0.0 for one in layers) or 1.0
        worths = [
            _bar(
                number,
                (one.worth or 0.0) / highest,
                "worth",
                f"layer {one.layer}: {100 * (one.worth or 0.0):.1f} % of what all layers did",
            )
            for number, one in enumerate(layers)
        ]
        charts.append(
            chart(
                "What the layers were measured to be worth",
                _rows(worths, len(layers), "worth by layer"),
                across=number_axis("share of the change (% of all layers)", 100 * highest),
                up=rows_axis("layer", labels),
                note="How much of the model's stream changes when this layer alone is made as small as all are on "
                "average. Bytes go where they lower the sum most.",
            )
        )
    return tag("div", *charts, class_="pair")


def _rows(shapes: Sequence[str], count: int, label: str) -> Markup:
    picture = stretched(*shapes, wide=_FULL, high=_ROW * count, label=label, class_="layers")
    return tag("div", picture, style=f"height:{_pixels(count, 22)}px")


def _bar(number: int, share: float, class_: str, said: str) -> Markup:
    box = {"y": _ROW * number + 1.5, "height": 7.0, "class_": class_}
    return tag("g", tag("title", said), tag("rect", x=0.0, width=_FULL * share, **box))


def _pixels(rows: int, each: int) -> int:
    """Height of a picture with so many rows; models with very many layers get lower ones."""
    return round(rows * max(each / 3, min(each, 2400 / rows)))


def _forms(prototypes: Sequence[PrototypeFact]) -> dict[str, float]:
    """Form -> opacity, the fewest bits first."""
    found = sorted(
        {one.form for one in prototypes}, key=lambda form: (_bits(prototypes, form), form)
    )
    span = max(1, len(found) - 1)
    return {one: 1 - (1 - _FAINT) * (len(found) - 1 - n) / span for n, one in enumerate(found)}


def _bits(prototypes: Sequence[PrototypeFact], form: str) -> float:
    """Mean bits a weight of the experts in this form; 0 where they are not known."""
    bits = [one.bits for one in prototypes if one.form == form and one.bits is not None]
    return sum(bits) / len(bits) if bits else 0.0


def _shades(prototypes: Sequence[PrototypeFact], forms: dict[str, float]) -> list[tuple[str, str]]:
    """A sample a form, the most bits first, with how many experts have it."""
    found = []
    for form, opacity in reversed(forms.items()):
        count, bits = sum(one.form == form for one in prototypes), _bits(prototypes, form)
        word = form + (f": {bits:.1f} bits" if bits else "")
        box = {"width": 14.0, "height": 18.0, "class_": "expert", "fill_opacity": opacity}
        sample = tag("rect", x=3.0, y=1.0, **box)
        sample = tag("svg", sample, class_="sample", viewBox="0 0 20 20", aria_hidden="true")
        found.append((sample, f"{word}, {count:,} expert{'' if count == 1 else 's'}"))
    return found


def _foot(kind: str) -> Markup:
    height = {"alias": 6.0, "constant": 3.0, "dropped": 1.5}[kind]
    box = tag("rect", x=3.0, y=19.0 - height, width=14.0, height=height, class_=kind)
    return tag("svg", box, class_="sample", viewBox="0 0 20 20", aria_hidden="true")
