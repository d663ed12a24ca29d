"""What the router slots of a layer stand for in an engine that keeps one stack of experts a layer; and what such an
engine cannot take.

``layer_tables`` turns a manifest into one ``LayerTable`` a layer: the prototypes that are in its stack, in order, and
for every router slot the position of its prototype in it. Layers that share prototypes (a scope) get the same stack,
so that they can also share the memory. Plain numbers only: no torch, no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conmoe_edge.checkpoint.format.forms import KIND_OF_VALUES, SCALE
from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest, RecordLayout
from conmoe_edge.errors import ConmoeError, UsageError

PARTS = ("gate_up_proj", "down_proj")
"""The projections of an expert that vLLM's stacked weights have, in the orientation [out, in]."""


class NotServable(UsageError):
    """What a package, or a way of starting vLLM, asks for and cannot get. Says all three sentences: vLLM prints the
    text of an exception and nothing else of it.
    """

    def __str__(self) -> str:
        return sentences(self)


def sentences(error: ConmoeError) -> str:
    """What, why and fix in one text."""
    parts = [error.what, error.why, error.fix and f"Instead: {error.fix}"]
    return " ".join(part if part.endswith(".") else f"{part}." for part in parts if part)


@dataclass(frozen=True, slots=True)
class LayerTable:
    """One layer's experts.

    Attributes:
        layer: the decoder layer.
        leader: first layer that has this very stack; the layer itself where no other shares it.
        stack: the prototypes whose weights are held, ascending.
        target: router slot -> position in ``stack``; -1 where a slot has no prototype.
        scales: router slot -> factor of its gate.
        constants: router slot -> row of the layer's constants; -1 where a slot has none.
        width: neurons of the widest prototype of the stack.
    """

    layer: int
    leader: int
    stack: tuple[ExpertId, ...]
    target: tuple[int, ...]
    scales: tuple[float, ...]
    constants: tuple[int, ...]
    width: int

    @property
    def scaled(self) -> bool:
        """Whether any slot has a scale other than 1."""
        return any(scale != 1.0 for scale in self.scales)

    @property
    def has_constants(self) -> bool:
        """Whether any slot adds a constant."""
        return any(row >= 0 for row in self.constants)


def layer_tables(manifest: Manifest) -> dict[int, LayerTable]:
    """Decoder layer -> its table."""
    layout_of = {entry.id: manifest.layouts[entry.layout] for entry in manifest.prototypes}
    tables = {}
    for group in _groups(manifest):
        stack = sorted(
            {slot.prototype for layer in group for slot in manifest.slots[layer] if slot.prototype}
        )
        position = {prototype: place for place, prototype in enumerate(stack)}
        width = max((width_of(layout_of[prototype]) for prototype in stack), default=0)
        for layer in group:
            row = manifest.slots[layer]
            tables[layer] = LayerTable(
                layer=layer,
                leader=group[0],
                stack=tuple(stack),
                target=tuple(-1 if s.prototype is None else position[s.prototype] for s in row),
                scales=tuple(slot.scale for slot in row),
                constants=tuple(-1 if s.constant is None else s.constant for s in row),
                width=width,
            )
    return dict(sorted(tables.items()))


def share_of(stack: tuple[ExpertId, ...], rank: int, ranks: int) -> range:
    """Positions of the stack that one of ``ranks`` ranks holds: runs of equal length, the first ones longer by one
    where it does not come out even.
    """
    base, over = divmod(len(stack), ranks)
    first = rank * base + min(rank, over)
    return range(first, first + base + (rank < over))


def check_servable(folder: Path, manifest: Manifest) -> None:
    """Refuse what vLLM cannot run without changing the numbers.

    Raises:
        NotServable: with the command that makes something it can run.
    """
    export = f"conmoe-edge export {folder} --format hf DIR, and serve DIR"
    if manifest.dense_precision != "source":
        raise NotServable(
            f"The package in {folder} has its dense weights in {manifest.dense_precision}.",
            "vLLM reads them as the model's own",
            f"conmoe-edge fit MODEL --for vllm --out DIR; or {export}",
        )
    masked = sorted(rerouted(manifest))
    if masked:
        raise NotServable(
            f"The package in {folder} only prunes: routers may not choose the slots that were removed.",
            f"vLLM's routers have no such mask (layer {masked[0]} needs one)",
            f"{export}: that is a plain smaller checkpoint with the same logits",
        )
    for layout in manifest.layouts:
        names = {part.name for part in layout.parts if not part.name.endswith(SCALE)}
        if names != set(PARTS):
            raise NotServable(
                f"The experts of the package in {folder} have {', '.join(sorted(names))}.",
                "only gate, up and down projections without biases are served from prototypes",
                export,
            )


def rerouted(manifest: Manifest) -> frozenset[int]:
    """Layers whose router may not choose slots that have neither prototype nor constant."""
    return frozenset(getattr(manifest, "rerouted", ()))


def width_of(layout: RecordLayout) -> int:
    """Neurons of the experts that have this layout: the inputs of their down projection."""
    part = next(part for part in layout.parts if part.name == "down_proj")
    return part.shape[1] * (2 if KIND_OF_VALUES.get(part.dtype) == "int4" else 1)


def _groups(manifest: Manifest) -> list[list[int]]:
    """Layers that share prototypes, directly or through others, ascending."""
    group_of: dict[int, list[int]] = {layer: [layer] for layer in sorted(manifest.slots)}
    owner: dict[ExpertId, int] = {}
    for layer, row in sorted(manifest.slots.items()):
        for slot in row:
            if slot.prototype is None:
                continue
            first = owner.setdefault(slot.prototype, layer)
            if group_of[first] is not group_of[layer]:
                merged = sorted(group_of[first] + group_of[layer])
                for one in merged:
                    group_of[one] = merged
    return [group for layer, group in group_of.items() if group[0] == layer]
