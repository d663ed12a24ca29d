"""How many cache slots a budget holds, and how groups of layers share them. Arithmetic only, no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap, sharing_layers
from conmoe_edge.errors import DoesNotFit
from conmoe_edge.units import human_size


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
            f"The budget of {human_size(device_bytes)} holds no prototype.",
            f"everything else needs {human_size(fixed_bytes)}, and a cache slot another {human_size(least)}",
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


def groups_of(manifest: Manifest) -> tuple[int, ...]:
    """Group of every prototype: layers that share a prototype are one group, numbered by their first layers.

    A prototype that no layer uses belongs to the layer that it comes from.
    """
    maps = SlotMap.of_manifest(manifest)
    first = {layer: group[0] for group in sharing_layers(maps) for layer in group}
    user = {number: layer for layer, one in maps.items() for number in one.prototypes}
    found = [first[user.get(n, entry.id.layer)] for n, entry in enumerate(manifest.prototypes)]
    order = sorted(set(found))
    return tuple(order.index(layer) for layer in found)


def miss_curve(rows: Sequence[Sequence[int]], size: int) -> list[int]:
    """Misses of a least recently used cache over ``rows`` with 0, 1, ... ``size`` slots.

    Stack distances (Mattson et al., IBM Systems Journal 9(2), 1970) with a whole row as one step: an item of a row
    is there in a cache of n slots if fewer than n others were used later than it, before the row. A row counts as
    used in ascending order.

    Args:
        rows: passes; each a row of distinct items in ascending order.
        size: how many different items there are at the most.

    Memory: 4 bytes for each (row, item).
    """
    if not rows:
        return [0] * (size + 1)
    items = {item: i for i, item in enumerate(sorted({item for row in rows for item in row}))}
    lengths = [len(row) for row in rows]
    step = np.repeat(np.arange(len(rows)), lengths)
    item = np.array([items[one] for row in rows for one in row], dtype=np.int64)
    # last[t, p]: a number that grows with the last use of p before row t; -1 before its first use.
    last = np.full((len(rows) + 1, len(items)), -1, dtype=np.int32)
    last[step + 1, item] = np.arange(len(item))
    np.maximum.accumulate(last, axis=0, out=last)
    before = last[step, item]
    distance = np.empty(len(item), dtype=np.int64)
    for start in range(0, len(item), 1 << 14):
        part = slice(start, start + (1 << 14))
        distance[part] = np.count_nonzero(last[step[part]] > before[part, None], axis=1)
    hits = np.bincount(distance[before >= 0], minlength=size)[:size]
    return [int(n) for n in len(item) - np.concatenate([[0], np.cumsum(hits)])]


def allot(gains: Sequence[Sequence[int]], slots: int, least: Sequence[int] = ()) -> tuple[int, ...]:
    """Quotas that add up to ``slots`` at the most: where one more slot saves the most misses, there it goes.

    Args:
        gains: for every group, what its 1st, 2nd, ... slot saves; as many as it has items.
        slots: how many there are.
        least: what each group gets first, as far as there is room, a slot each in turn.

    Curves need not be concave: a step that saves nothing is taken together with those after it, by the best average.
    Ties go to the group with the fewest slots, then the first.
    """
    sizes = [len(gain) for gain in gains]
    quotas = [0] * len(gains)
    floor = [min(size, want) for size, want in zip(sizes, least or [0] * len(sizes), strict=True)]
    left = slots
    while left > 0 and any(quota < want for quota, want in zip(quotas, floor, strict=True)):
        for group, want in enumerate(floor):
            if quotas[group] < want and left > 0:
                quotas[group] += 1
                left -= 1
    steps = [_best_step(gain, quota, left) for gain, quota in zip(gains, quotas, strict=True)]
    while left > 0 and any(more for _, more in steps):
        group = min(
            (g for g, (_, more) in enumerate(steps) if more),
            key=lambda g: (-steps[g][0], quotas[g], g),
        )
        quotas[group] += steps[group][1]
        left -= steps[group][1]
        for other, (_, more) in enumerate(steps):
            if other == group or more > left:
                steps[other] = _best_step(gains[other], quotas[other], left)
    return tuple(quotas)


def _best_step(gain: Sequence[int], quota: int, left: int) -> tuple[float, int]:
    """(average gain, number) of the next slots of a group that save the most each; number 0 where it has them all."""
    best, total = (-1.0, 0), 0
    for more, one in enumerate(gain[quota : quota + left], start=1):
        total += one
        if total / more > best[0]:
            best = (total / more, more)
    return best


def _least_size(nbytes: int) -> str:
    """A size to type that is at least ``nbytes``: hundredths of a decimal gigabyte, rounded up."""
    return f"{-(-nbytes // 10**7) / 100:.2f}GB"
