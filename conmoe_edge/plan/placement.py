"""How the device tier is divided between workspace and slots. Arithmetic only.

    left = device_bytes - fixed terms
    workspace = an eighth of what is left, but at least what the smallest prefill chunk needs, at
                most what the largest needs, and less where that makes all prototypes (or else
                the wanted share of them) resident
    slots = (left - workspace) / record

A larger chunk reads every offloaded prototype fewer times during prefill, so it is worth some
slots; it is never worth removing experts. Where some stay offloaded the workspace may be a sixteenth of
what is left, for chunks beyond the usual ones, but not larger by more than a thirty-second of what is
offloaded. Written like this, more memory never means fewer slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conmoe_edge.checkpoint.format.manifest import MAX_CHUNK, USUAL_CHUNK
from conmoe_edge.plan.needs import Needs
from conmoe_edge.plan.plan import Term

_WORKSPACE_DIVISOR = 8
_LONG_DIVISOR, _OFFLOADED_DIVISOR = 16, 32
"""For chunks beyond the usual ones: a prompt reads what is offloaded once a chunk, but each token of an answer pays for
the slots that they cost, with a thirty-second more misses at the most.
"""


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
    needs: Needs,
    device_bytes: int,
    *,
    prototypes: int,
    record_bytes: int,
    pool_bytes: int,
    wanted_share: float = 0.0,
    slot_bytes: int | None = None,
) -> Placement:
    """Divide ``device_bytes``; ``wanted_share`` of the prototypes are made resident before the
    workspace may grow.

    A slot holds the largest record, ``record_bytes`` (``slot_bytes`` on the average, where that is known), unless all
    ``prototypes`` have one: those take ``pool_bytes``. The floor is one slot a MoE layer (or one a prototype, where
    there are fewer prototypes than layers).
    """

    def nbytes(slots: int) -> int:
        return pool_bytes if slots == prototypes else min(slots * slot, pool_bytes)

    slot = slot_bytes or record_bytes
    floor = min(prototypes, needs.moe_layers)
    fixed = needs.fixed(record_bytes)
    left = device_bytes - fixed
    least = fixed + needs.smallest + nbytes(floor)

    wanted = max(floor, wanted_slots(prototypes, wanted_share))
    workspace = _workspace(needs, left)
    longest = USUAL_CHUNK
    for slots in (prototypes, wanted, floor):
        spare = left - nbytes(slots)
        if slots < prototypes:
            workspace = max(workspace, _long_workspace(needs, left, pool_bytes))
            longest = MAX_CHUNK
        if spare >= needs.smallest:
            workspace = min(workspace, spare)
            break
    chunk = needs.largest_chunk(workspace, longest)
    remaining = left - workspace
    return Placement(
        terms=needs.terms(record_bytes, workspace, chunk),
        prefill_chunk=chunk,
        left_for_prototypes=remaining,
        slots=prototypes if remaining >= pool_bytes else max(0, remaining // slot),
        fits=device_bytes >= least,
        least_bytes=least,
    )


def room_beside_workspace(needs: Needs, device_bytes: int, record_bytes: int) -> int:
    """Bytes for prototypes where none of them has to give way to the workspace nor it to them; below
    0 where there is no room.
    """
    left = device_bytes - needs.fixed(record_bytes)
    return left - _workspace(needs, left)


def _workspace(needs: Needs, left: int) -> int:
    return min(max(left // _WORKSPACE_DIVISOR, needs.smallest), needs.largest)


def _long_workspace(needs: Needs, left: int, pool_bytes: int) -> int:
    """What chunks beyond the usual ones may have, where not all of ``pool_bytes`` find room."""
    usual = _workspace(needs, left)
    offloaded = max(0, pool_bytes - (left - usual))
    return min(left // _LONG_DIVISOR, needs.longest, usual + offloaded // _OFFLOADED_DIVISOR)


def wanted_slots(prototypes: int, share: float) -> int:
    """The fewest slots that hold ``share`` of the prototypes; a rounding error does not cost a
    slot.
    """
    return math.ceil(share * prototypes - 1e-9)
