"""What became of every router slot, and what each prototype carries. Numbers of a manifest, put together; no files.

How much a slot was used comes from the calibration (``Manifest.overview``). Packages from before there was such an
overview have the routing trace, which counts how often each slot was chosen in some sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.plan.trace import RoutingTrace
from conmoe_edge.report.record_shape import form_of, neurons_of

Kind = Literal["prototype", "alias", "constant", "dropped"]
KINDS: tuple[Kind, ...] = ("prototype", "alias", "constant", "dropped")


@dataclass(frozen=True, slots=True)
class Usage:
    """How much went to every router slot.

    Attributes:
        source: ``calibration`` (routing weight) or ``trace`` (how often it was chosen).
        shares: layer -> share of the whole model's that each slot got; all together 1.
        tokens: layer -> tokens that chose each slot.
    """

    source: Literal["calibration", "trace"]
    shares: Mapping[int, Sequence[float]]
    tokens: Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True)
class SlotFact:
    """One router slot.

    Attributes:
        id: layer and number; also the name of the expert that was there.
        kind: its own expert as a ``prototype``, an ``alias`` of another, a ``constant`` alone, or ``dropped``.
        prototype: where it leads.
        scale, constant: what else is done to the prototype's output.
        share: of the model's routing weight (or of its choices); ``None`` where that is not known.
        relative: the same in units of an equal share within the layer.
        tokens: that chose it.
        distance: between its pretrained expert and that of the prototype; ``None`` where that is not known.
    """

    id: ExpertId
    kind: Kind
    prototype: ExpertId | None
    scale: float
    constant: bool
    share: float | None
    relative: float | None
    tokens: int | None
    distance: float | None


@dataclass(frozen=True, slots=True)
class PrototypeFact:
    """One prototype.

    Attributes:
        id: the expert that it was.
        slots: how many lead to it.
        layers: that these are of, ascending.
        weight: the share of the routing weight that it carries.
        precision: the form of its record, by its name in the manifest.
        nbytes: of its record.
        form: the same form in words.
        neurons: that it keeps; 0 where that is not known.
        whole: neurons of the expert before; 0 where that is not known.
        bits: of its record a weight that it keeps, scales and padding included; ``None`` where that is not known.
    """

    id: ExpertId
    slots: int
    layers: tuple[int, ...]
    weight: float
    precision: str
    nbytes: int
    form: str
    neurons: int
    whole: int
    bits: float | None

    @property
    def short_form(self) -> str:
        """The form in a few letters: ``q2-q3``, ``bf16``."""
        return self.form if self.precision == "source" else self.precision

    @property
    def narrower(self) -> bool:
        """Whether it is known to have fewer neurons than the expert."""
        return 0 < self.neurons < self.whole


def usage_of(manifest: Manifest, trace: RoutingTrace | None) -> Usage | None:
    """The best that the package knows; ``None`` where it knows nothing."""
    if manifest.overview:
        overview = manifest.overview.items()
        return Usage(
            "calibration",
            {layer: one.weights for layer, one in overview},
            {layer: one.tokens for layer, one in overview},
        )
    if trace is None:
        return None
    counts = {layer: [0] * len(manifest.slots[layer]) for layer in trace.layers}
    for layer, rows in zip(trace.layers, trace.slots, strict=True):
        for row in rows:
            for slot in row:
                if 0 <= slot < len(counts[layer]):  # anything else is a skip mark
                    counts[layer][slot] += 1
    total = sum(map(sum, counts.values())) or 1
    shares = {layer: [count / total for count in row] for layer, row in counts.items()}
    return Usage("trace", shares, counts)


def slot_facts(manifest: Manifest, usage: Usage | None) -> dict[int, tuple[SlotFact, ...]]:
    """Layer -> its router slots in their order."""
    return {layer: _layer(manifest, usage, layer) for layer in sorted(manifest.slots)}


def _layer(manifest: Manifest, usage: Usage | None, layer: int) -> tuple[SlotFact, ...]:
    row = manifest.slots[layer]
    shares = usage.shares[layer] if usage is not None else None
    equal = sum(shares) / len(row) if shares else 0.0
    seen = manifest.overview.get(layer)
    facts = []
    for number, slot in enumerate(row):
        own = ExpertId(layer, number)
        kind: Kind = "prototype" if slot.prototype == own else "alias"
        if slot.prototype is None:
            kind = "dropped" if slot.constant is None else "constant"
        distance = seen.distances[number] if seen is not None else None
        if distance is None and kind == "prototype":
            distance = 0.0
        facts.append(
            SlotFact(
                own,
                kind,
                slot.prototype,
                slot.scale,
                slot.constant is not None,
                shares[number] if shares else None,
                shares[number] / equal if shares and equal else None,
                usage.tokens[layer][number] if usage is not None else None,
                distance,
            )
        )
    return tuple(facts)


def prototype_facts(manifest: Manifest) -> tuple[PrototypeFact, ...]:
    """In the order of the manifest."""
    leading: dict[ExpertId, list[int]] = {entry.id: [] for entry in manifest.prototypes}
    for layer, row in sorted(manifest.slots.items()):
        for slot in row:
            if slot.prototype is not None:
                leading[slot.prototype].append(layer)
    shapes = [(form_of(layout), neurons_of(layout)) for layout in manifest.layouts]
    facts = []
    for entry in manifest.prototypes:
        layout, (form, neurons) = manifest.layouts[entry.layout], shapes[entry.layout]
        was = manifest.originals.get(entry.id.layer)
        bits = None
        if was is not None and neurons:
            bits = 8 * layout.nbytes * was.neurons / (was.weights * neurons)
        facts.append(
            PrototypeFact(
                entry.id,
                len(leading[entry.id]),
                tuple(sorted(set(leading[entry.id]))),
                entry.weight,
                layout.precision,
                layout.nbytes,
                form,
                neurons,
                0 if was is None else was.neurons,
                bits,
            )
        )
    return tuple(facts)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    place = max(0, -(-round(share * 1000) * len(ordered) // 1000) - 1)
    return ordered[min(place, len(ordered) - 1)]
