"""How the bytes of a package were divided: how many prototypes have which bits and how many neurons. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from conmoe_edge.checkpoint.format.layout import expert_width
from conmoe_edge.checkpoint.format.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Division:
    """Prototypes of one kind and width.

    Attributes:
        kind: of their records (``levers.FREE_KINDS``, or another precision).
        width: neurons.
        prototypes: how many.
        nbytes: of all of them.
        weight: the share of the routing weight that they carry.
    """

    kind: str
    width: int
    prototypes: int
    nbytes: int
    weight: float


def division_of(manifest: Manifest, *, transposed: bool) -> tuple[Division, ...]:
    """By bytes a prototype, the most first. ``transposed``: whether the model keeps projections as [in, out]."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for entry in manifest.prototypes:
        layout = manifest.layouts[entry.layout]
        key = layout.precision, expert_width(layout, transposed)
        found.setdefault(key, []).append((layout.nbytes, entry.weight))
    divisions = [
        Division(
            *(kind, width, len(own)),
            nbytes=sum(nbytes for nbytes, _ in own),
            weight=sum(weight for _, weight in own),
        )
        for (kind, width), own in found.items()
    ]
    return tuple(sorted(divisions, key=lambda one: (-one.nbytes / one.prototypes, one.kind)))
