"""How many cache slots a budget holds. Arithmetic only, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from conmoe_edge.errors import DoesNotFit
from conmoe_edge.units import gib


def slots_for(
    device_bytes: int, fixed_bytes: int, records: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Slots of every record layout.

    Args:
        device_bytes: the whole budget.
        fixed_bytes: everything on the device that is not a prototype.
        records: ``(bytes of a record, number of prototypes)`` of every layout.

    Returns:
        All prototypes of every layout where they fit; else the same share of each layout, rounded
        down, at least one, what is left going to the layouts in order. A layout without prototypes
        has no slots.

    Raises:
        DoesNotFit: not even one slot of each layout.
    """
    left = device_bytes - fixed_bytes
    total = sum(nbytes * count for nbytes, count in records)
    if total <= left:
        return tuple(count for _, count in records)
    least = sum(nbytes for nbytes, count in records if count)
    if least > left:
        raise DoesNotFit(
            f"The budget of {gib(device_bytes)} holds no prototype.",
            f"everything else needs {gib(fixed_bytes)}, and a cache slot another {gib(least)}",
            f"Give at least --gpu {_least_size(fixed_bytes + least)}, or a smaller --context.",
        )
    slots = [min(count, max(1, left * count // total)) if count else 0 for _, count in records]
    # The guaranteed single slots may have cost more than their share: take it back from the largest
    # layouts.
    while (used := sum(n * nbytes for n, (nbytes, _) in zip(slots, records, strict=True))) > left:
        slots[max(range(len(slots)), key=lambda i: (slots[i], -i))] -= 1
    for i, (nbytes, count) in enumerate(records):
        extra = min(count - slots[i], (left - used) // nbytes)
        slots[i] += extra
        used += extra * nbytes
    return tuple(slots)


def halved(slots: Sequence[int]) -> tuple[int, ...] | None:
    """Half the slots of every layout, at least one; ``None`` where nothing can be given up."""
    half = tuple(max(1, count // 2) if count else 0 for count in slots)
    return None if half == tuple(slots) else half


def _least_size(nbytes: int) -> str:
    """A size to type that is at least ``nbytes``: hundredths of a decimal gigabyte, rounded up."""
    return f"{-(-nbytes // 10**7) / 100:.2f}GB"
