"""A layer's map for an engine that keeps one stack of experts a layer, and what such an engine cannot take.

``layer_stacks`` turns a manifest into one ``LayerStack`` a layer: the prototypes that are in its stack, in order, and
its map with positions in the stack for prototype numbers. Layers that share prototypes (a scope) get the same stack, so
that they can also share the memory. No torch, no vLLM here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conmoe_edge.checkpoint.format.forms import DOWN, SCALE, UP
from conmoe_edge.checkpoint.format.layout import expert_width
from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap, sharing_layers
from conmoe_edge.errors import ConmoeError, UsageError

PARTS = (UP, DOWN)
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
class LayerStack:
    """One layer's experts.

    Attributes:
        leader: first layer that has this very stack; the layer itself where no other shares it.
        stack: the prototypes whose weights are held, ascending.
        slots: the layer's map; its prototype numbers are positions in ``stack``.
        width: neurons of the widest prototype of the stack.
    """

    leader: int
    stack: tuple[ExpertId, ...]
    slots: SlotMap
    width: int

    @property
    def layer(self) -> int:
        """The decoder layer."""
        return self.slots.layer


def layer_stacks(manifest: Manifest) -> dict[int, LayerStack]:
    """Decoder layer -> its stack, layers ascending."""
    maps, entries = SlotMap.of_manifest(manifest), manifest.prototypes
    stacks = {}
    for group in sharing_layers(maps):
        used = {number for layer in group for number in maps[layer].prototypes}
        stack = sorted(used, key=lambda number: entries[number].id)
        position = {number: place for place, number in enumerate(stack)}
        widths = [expert_width(manifest.layouts[entries[number].layout]) for number in stack]
        for layer in group:
            stacks[layer] = LayerStack(
                leader=group[0],
                stack=tuple(entries[number].id for number in stack),
                slots=maps[layer].renumbered(position),
                width=max(widths, default=0),
            )
    return dict(sorted(stacks.items()))


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
    if manifest.kv_precision != "source":
        raise NotServable(
            f"The package in {folder} keeps keys and values in {manifest.kv_precision}.",
            "vLLM keeps them in a cache of its own, and would answer otherwise than this package does here",
            f"conmoe-edge fit MODEL --for vllm --out DIR, or without --for and with --kv-precision source; or {export}",
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
