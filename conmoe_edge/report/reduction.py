"""What was taken from the experts, in all and layer by layer: counted once for terminal, JSON and page. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.report.slot_shares import PrototypeFact
from conmoe_edge.units import human_size


@dataclass(frozen=True, slots=True)
class LayerFact:
    """The experts of one layer.

    Attributes:
        layer: decoder layer.
        experts: that there were.
        prototypes: of these that are kept.
        nbytes: of their records.
        bytes_before: of all experts in the checkpoint; ``None`` where that is not known.
        worth: of all layers' measured worth (``LayerOriginal.worth``), the share of this one; ``None`` where it was
            not measured.
    """

    layer: int
    experts: int
    prototypes: int
    nbytes: int
    bytes_before: int | None
    worth: float | None


@dataclass(frozen=True, slots=True)
class Reduction:
    """The experts of the whole model.

    Attributes:
        experts: that there were.
        kept: of these that are prototypes.
        narrower: of these that have fewer neurons; ``None`` where that is not known.
        bytes_now: of the prototypes' records.
        bytes_before: of all experts in the checkpoint.
        weights_share: of the experts' weights that are still there.
        bits_before, bits_now: a weight of the original's experts.
    """

    experts: int
    kept: int
    narrower: int | None
    bytes_now: int
    bytes_before: int | None
    weights_share: float | None
    bits_before: float | None
    bits_now: float | None

    @property
    def removed(self) -> float | None:
        """The share of the experts' bytes that is gone; less than 0 where records are larger than the checkpoint's."""
        return None if not self.bytes_before else 1 - self.bytes_now / self.bytes_before


def layer_facts(manifest: Manifest, prototypes: Sequence[PrototypeFact]) -> Mapping[int, LayerFact]:
    """Decoder layer -> its experts. Prototypes count in the layer that they come from."""
    known = {layer: one.worth for layer, one in manifest.originals.items()}
    total = sum(one or 0.0 for one in known.values())
    found = {}
    for layer, row in sorted(manifest.slots.items()):
        own = [one for one in prototypes if one.id.layer == layer]
        was, worth = manifest.originals.get(layer), known.get(layer)
        found[layer] = LayerFact(
            layer,
            len(row),
            len(own),
            sum(one.nbytes for one in own),
            None if was is None else len(row) * was.nbytes,
            None if worth is None or not total else worth / total,
        )
    return found


def reduction(manifest: Manifest, prototypes: Sequence[PrototypeFact]) -> Reduction:
    """Over all layers."""
    now = sum(one.nbytes for one in prototypes)
    experts = sum(map(len, manifest.slots.values()))
    was = [(len(row), manifest.originals.get(layer)) for layer, row in manifest.slots.items()]
    weights = sum(count * one.weights for count, one in was if one is not None)
    before = sum(count * one.nbytes for count, one in was if one is not None)
    told = bool(weights) and all(one.neurons and one.whole for one in prototypes)
    left = sum(
        manifest.originals[one.id.layer].weights * one.neurons / one.whole
        for one in prototypes
        if told
    )
    return Reduction(
        experts,
        len(prototypes),
        sum(one.narrower for one in prototypes) if told else None,
        now,
        before or None,
        left / weights if told else None,
        8 * before / weights if weights else None,
        8 * now / weights if weights else None,
    )


def reduction_words(facts: Reduction) -> list[str]:
    """In statements: how many experts are kept and how, and what that is in bytes; empty without experts."""
    if not facts.experts:
        return []
    kept = f"{facts.kept:,} of {facts.experts:,} experts are kept"
    if facts.kept == facts.experts:
        kept = f"all {facts.experts:,} experts are kept"
    if facts.narrower:
        count = "all" if facts.narrower == facts.kept else f"{facts.narrower:,}"
        kept += f", {count} of them with fewer neurons"
    elif facts.narrower == 0 and facts.kept:
        kept += " with all of their neurons"
    words = [kept]
    if facts.bytes_before and facts.removed is not None and facts.bits_before and facts.bits_now:
        change = f"{100 * abs(facts.removed):.0f} % {'less' if facts.removed >= 0 else 'more'}"
        words.append(
            f"{human_size(facts.bytes_before)} became {human_size(facts.bytes_now)}, {change}; "
            f"{facts.bits_before:.2f} bits a weight became {facts.bits_now:.2f}"
        )
    return words


def and_list(words: Sequence[str]) -> str:
    """``q2, q3 and int8``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
