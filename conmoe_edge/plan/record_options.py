"""What the prototype of an expert may become: with so many neurons, in so many bits; and what a budget in bits means.

With the precision ``free`` every prototype has a width and a kind of its own, and only the bytes of all of them are
given. Widths are about even parts of an expert's (as ``width_levers.steps``), whole groups of the forms in few bits.
Bytes are those of whole records, pages and fallbacks of shapes that a form cannot take included. Bits count all that a
package has of its experts: records, and beside them constants, map and headers. Arithmetic only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from conmoe_edge.checkpoint.format.forms import LOW_GROUP
from conmoe_edge.checkpoint.format.layout import PAGE
from conmoe_edge.model.anatomy import ExpertsAnatomy, ModelAnatomy
from conmoe_edge.plan.levers import FREE, FREE_KINDS, PRECISIONS, record_bytes, record_parts
from conmoe_edge.plan.width_levers import PARTS, steps
from conmoe_edge.units import round_up

_NAMED, _MAPPED = 96, 32
"""Bytes that an expert takes in the header of a file of records, and in the map of router slots."""


@dataclass(frozen=True, slots=True)
class RecordOption:
    """A record that a prototype may become."""

    width: int
    kind: str
    nbytes: int


def record_options(experts: ExpertsAnatomy, precision: str) -> tuple[RecordOption, ...]:
    """All of them, by bytes ascending, then width; of a mixed precision those of its narrow kind."""
    # Of layers that are alike the same is asked again and again.
    return _record_options(replace(experts, module="", count=1, top_k=1), precision)


@lru_cache(maxsize=64)
def _record_options(experts: ExpertsAnatomy, precision: str) -> tuple[RecordOption, ...]:
    if precision != FREE:
        kind = PRECISIONS[precision].kinds[-1]
        return tuple(
            RecordOption(width, kind, record_bytes(experts.narrowed(width), kind))
            for width in steps(experts, precision)
        )
    found: list[RecordOption] = []
    for width in free_widths(experts):
        narrow = experts.narrowed(width)
        seen = []
        for kind in FREE_KINDS:
            parts = record_parts(narrow, kind)
            if parts not in seen:  # a shape that forms in few bits cannot take has int8 for them
                seen.append(parts)
                found.append(RecordOption(width, kind, record_bytes(narrow, kind)))
    return tuple(sorted(found, key=lambda one: (one.nbytes, one.width)))


def free_widths(experts: ExpertsAnatomy) -> tuple[int, ...]:
    """The numbers of neurons, ascending, all of them the last."""
    width = experts.width
    if width % LOW_GROUP:
        return (width,)
    among = range(LOW_GROUP, width, LOW_GROUP)
    found = {
        min(among, key=lambda one: (abs(one - width * part / PARTS), one))
        for part in range(1, PARTS)
        if among
    }
    return (*sorted(found), width)


def expert_weights(anatomy: ModelAnatomy) -> int:
    """Numbers in the weight matrices of all routed experts: what bits are counted by."""
    return sum(layer_weights(one.experts) for one in anatomy.moe_layers if one.experts is not None)


def layer_weights(experts: ExpertsAnatomy) -> int:
    """Of one layer."""
    matrices = (math.prod(part.shape) for part in experts.parts if len(part.shape) == 2)
    return experts.count * sum(matrices)


def bytes_of_bits(anatomy: ModelAnatomy, bits: float) -> int:
    """Bytes of all that a package has of its experts for ``bits`` a weight of the original's routed experts."""
    return math.floor(bits * expert_weights(anatomy) / 8)


def bits_of_bytes(anatomy: ModelAnatomy, nbytes: int) -> float:
    """The other way."""
    return nbytes * 8 / expert_weights(anatomy)


def slot_bytes(experts: ExpertsAnatomy) -> int:
    """Of the constant of a router slot, as its file has it: in bf16."""
    return 2 * experts.outputs


def constant_bytes(anatomy: ModelAnatomy) -> int:
    """Of constants of all router slots while a package runs, in fp32: no package has more."""
    return sum(2 * slot_bytes(one) * one.count for one in anatomy.moe_experts)


def beside_bytes(anatomy: ModelAnatomy) -> int:
    """What a package has of its experts beside prototypes and constants, where every layer has prototypes of its own:
    the map, and the headers of the files of records.
    """
    headers = sum(round_up(_NAMED * one.count, PAGE) for one in anatomy.moe_experts)
    return headers + _MAPPED * anatomy.expert_count


def pool_of_bits(anatomy: ModelAnatomy, bits: float) -> int:
    """Bytes of all prototypes together, and of the constants in place of those that go, where they and what is beside
    them take ``bits`` a weight of the original's routed experts.
    """
    return bytes_of_bits(anatomy, bits) - beside_bytes(anatomy)


def bits_of_pool(anatomy: ModelAnatomy, pool: int) -> float:
    """The other way."""
    return bits_of_bytes(anatomy, pool + beside_bytes(anatomy))


def layer_room(anatomy: ModelAnatomy, layer: int, nbytes: int) -> int:
    """Of ``nbytes`` for all prototypes, what a layer gets where all get the same for a weight."""
    experts = anatomy.layers[layer].experts
    assert experts is not None
    return nbytes * layer_weights(experts) // expert_weights(anatomy)


def free_range(anatomy: ModelAnatomy) -> tuple[int, int]:
    """The fewest and the most bytes that can be given: those with which half of a layer's share holds a record, as
    no layer gets less; and all experts whole in the widest kind.
    """
    least = most = 0
    whole = expert_weights(anatomy)
    for layer in anatomy.moe_layers:
        assert layer.experts is not None
        options = record_options(layer.experts, FREE)
        spare = PARTS * layer.experts.count  # what rounding to units can take
        spare += slot_bytes(layer.experts) * layer.experts.count
        here = 2 * (options[0].nbytes + spare) * whole
        least = max(least, -(-here // layer_weights(layer.experts)))
        most += layer.experts.count * options[-1].nbytes
    return least, most
