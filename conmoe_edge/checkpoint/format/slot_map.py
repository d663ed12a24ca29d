"""The reassignment map of one MoE layer: what each of its router slots stands for.

For a token t with router slots i and gates g_i, a consolidated layer computes (ConMoE, section 3.3)

    y(t) = sum over prototypes p of alpha_p(t) * p(x_t)  +  sum over i of g_i(t) * c_i,
    alpha_p(t) = sum over slots i with m(i) = p of g_i(t) * s_i.

``SlotMap`` holds m, s and the rows of the constants c, once and frozen. Every backend renders it for itself:
``model/slot_tensors.py`` for torch, ``offload/kernels/cpu/structs.py`` for the C++ operator,
``offload/kernels/triton/gpu_tables.py`` for Triton, ``integrations/vllm/layer_stacks.py`` for a stack of vLLM.
``merge`` and ``gated_constants`` are the plain reference that each of them is tested against.

No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest, SlotRecord

NONE = -1
"""The prototype number of a slot without prototype, and the row of a slot without constant."""


@dataclass(frozen=True, slots=True)
class SlotMap:
    """One entry a router slot in each tuple.

    Attributes:
        layer: the decoder layer.
        targets: prototype numbers; ``NONE`` where a slot has no prototype.
        scales: factor of a slot's gate.
        constants: row of the layer's constants; ``NONE`` where a slot has none.
    """

    layer: int
    targets: tuple[int, ...]
    scales: tuple[float, ...]
    constants: tuple[int, ...]

    @classmethod
    def of(
        cls, layer: int, slots: Sequence[SlotRecord], numbers: Mapping[ExpertId, int]
    ) -> SlotMap:
        """The map of ``slots``; ``numbers`` gives the number of every prototype that they name."""
        return cls(
            layer=layer,
            targets=tuple(NONE if s.prototype is None else numbers[s.prototype] for s in slots),
            scales=tuple(slot.scale for slot in slots),
            constants=tuple(NONE if s.constant is None else s.constant for s in slots),
        )

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> dict[int, SlotMap]:
        """Decoder layer -> its map, with the prototype numbers of the package; layers ascending."""
        numbers = {entry.id: number for number, entry in enumerate(manifest.prototypes)}
        return {
            layer: cls.of(layer, slots, numbers) for layer, slots in sorted(manifest.slots.items())
        }

    def __len__(self) -> int:
        """Router slots."""
        return len(self.targets)

    @property
    def prototypes(self) -> tuple[int, ...]:
        """The distinct prototype numbers, ascending."""
        return tuple(sorted({number for number in self.targets if number != NONE}))

    @property
    def is_scaled(self) -> bool:
        """Whether any slot has a scale other than 1."""
        return any(scale != 1.0 for scale in self.scales)

    @property
    def has_constants(self) -> bool:
        """Whether any slot adds a constant."""
        return self.constant_rows > 0

    @property
    def constant_rows(self) -> int:
        """How many rows of constants the layer must have at least."""
        return max(self.constants, default=NONE) + 1

    def renumbered(self, numbers: Mapping[int, int]) -> SlotMap:
        """The same map with other prototype numbers; a prototype that is not in ``numbers`` becomes ``NONE``."""
        return replace(self, targets=tuple(numbers.get(number, NONE) for number in self.targets))

    def merge(self, slots: Sequence[int], gates: Sequence[float]) -> dict[int, float]:
        """Prototype number -> alpha for the chosen slots of one token, numbers ascending, summed in fp64 in the order
        of the slots. An index outside the router's slots is a skip mark and adds nothing.
        """
        weights: dict[int, float] = {}
        for slot, gate in zip(slots, gates, strict=True):
            if 0 <= slot < len(self.targets) and self.targets[slot] != NONE:
                number = self.targets[slot]
                weights[number] = weights.get(number, 0.0) + gate * self.scales[slot]
        return dict(sorted(weights.items()))

    def gated_constants(
        self, slots: Sequence[int], gates: Sequence[float]
    ) -> list[tuple[int, float]]:
        """(row of the constants, gate) for the chosen slots of one token that have one, in the order of the slots."""
        return [
            (self.constants[slot], gate)
            for slot, gate in zip(slots, gates, strict=True)
            if 0 <= slot < len(self.constants) and self.constants[slot] != NONE
        ]


def sharing_layers(maps: Mapping[int, SlotMap]) -> tuple[tuple[int, ...], ...]:
    """The layers of ``maps`` in groups: layers that share a prototype, directly or through others, are in one group.

    Layers ascend inside a group; groups are in the order of their first layers.
    """
    groups: list[tuple[set[int], set[int]]] = []  # layers, prototypes
    for layer, one in maps.items():
        layers, numbers, apart = {layer}, set(one.prototypes), []
        for group in groups:
            if numbers.isdisjoint(group[1]):
                apart.append(group)
            else:
                layers |= group[0]
                numbers |= group[1]
        groups = [*apart, (layers, numbers)]
    return tuple(sorted(tuple(sorted(layers)) for layers, _ in groups))
