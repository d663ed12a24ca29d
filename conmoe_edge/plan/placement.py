"""How the device tier is divided between workspace and slots. Arithmetic only.

    left = device_bytes - fixed terms
    workspace = an eighth of what is left, but at least what the smallest prefill chunk needs, at
                most what the largest needs, and less where that makes all prototypes (or else
                the wanted share of them) resident
    slots = (left - workspace) / record

A larger chunk reads every offloaded prototype fewer times during prefill, so it is worth some
slots; it is never worth removing experts. Written like this, more memory never means fewer slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conmoe_edge.memory.budget import DeviceKind
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.needs import (
    MAX_CHUNK,
    MIN_CHUNK,
    device_terms,
    fixed_terms,
    workspace_bytes,
)
from conmoe_edge.plan.plan import Term

_WORKSPACE_DIVISOR = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """``terms`` and ``slots * record_bytes`` stay inside the budget wherever ``fits`` is true.

    ``least_bytes`` is what the smallest setting of the same prototypes needs: the smallest chunk,
    ``floor`` slots.
    """

    terms: tuple[Term, ...]
    prefill_chunk: int
    left_for_prototypes: int
    slots: int
    fits: bool
    least_bytes: int


def place(
    anatomy: ModelAnatomy,
    device: DeviceKind,
    device_bytes: int,
    *,
    context: int,
    prototypes: int,
    record_bytes: int,
    pool_bytes: int,
    wanted_share: float = 0.0,
) -> Placement:
    """Divide ``device_bytes``; ``wanted_share`` of the prototypes are made resident before the
    workspace may grow.

    A slot holds the largest record, ``record_bytes``, unless all ``prototypes`` have one: those take
    ``pool_bytes``. The floor is one slot a MoE layer (or one a prototype, where there are fewer
    prototypes than layers).
    """

    def nbytes(slots: int) -> int:
        return pool_bytes if slots == prototypes else min(slots * record_bytes, pool_bytes)

    floor = min(prototypes, len(anatomy.moe_layers))
    fixed = sum(term.nbytes for term in fixed_terms(anatomy, device, context, record_bytes))
    smallest_chunk = min(MIN_CHUNK, context)
    smallest = workspace_bytes(anatomy, device, context, smallest_chunk)
    largest = workspace_bytes(anatomy, device, context, min(MAX_CHUNK, context))
    left = device_bytes - fixed
    least = fixed + smallest + nbytes(floor)

    wanted = max(floor, wanted_slots(prototypes, wanted_share))
    workspace = _workspace(left, smallest, largest)
    for slots in (prototypes, wanted, floor):
        spare = left - nbytes(slots)
        if spare >= smallest:
            workspace = min(workspace, spare)
            break
    chunk = _largest_chunk(anatomy, device, context, workspace)
    remaining = left - workspace
    return Placement(
        terms=device_terms(anatomy, device, context, record_bytes, workspace, chunk),
        prefill_chunk=chunk,
        left_for_prototypes=remaining,
        slots=prototypes if remaining >= pool_bytes else max(0, remaining // record_bytes),
        fits=device_bytes >= least,
        least_bytes=least,
    )


def room_beside_workspace(
    anatomy: ModelAnatomy, device: DeviceKind, device_bytes: int, context: int, record_bytes: int
) -> int:
    """Bytes for prototypes where none of them has to give way to the workspace nor it to them; below
    0 where there is no room.
    """
    fixed = sum(term.nbytes for term in fixed_terms(anatomy, device, context, record_bytes))
    smallest = workspace_bytes(anatomy, device, context, min(MIN_CHUNK, context))
    largest = workspace_bytes(anatomy, device, context, min(MAX_CHUNK, context))
    left = device_bytes - fixed
    return left - _workspace(left, smallest, largest)


def _workspace(left: int, smallest: int, largest: int) -> int:
    return min(max(left // _WORKSPACE_DIVISOR, smallest), largest)


def wanted_slots(prototypes: int, share: float) -> int:
    """The fewest slots that hold ``share`` of the prototypes; a rounding error does not cost a
    slot.
    """
    return math.ceil(share * prototypes - 1e-9)


def _largest_chunk(anatomy: ModelAnatomy, device: DeviceKind, context: int, workspace: int) -> int:
    """The most tokens, in steps of the smallest chunk, whose workspace is inside ``workspace``."""
    for chunk in range(MAX_CHUNK, 0, -MIN_CHUNK):
        if chunk <= context and workspace_bytes(anatomy, device, context, chunk) <= workspace:
            return chunk
    return min(MIN_CHUNK, context)
