"""Cache policies tried on the calibration's routing, offline: which one would have had the most hits.

``fit`` replays the trace for the planned slots and writes the winner into the manifest; a package that is opened with
another number of slots replays again. What a policy is fitted on (quotas) is the first half of the trace, what it is
judged by is the second: history can overfit.

``replay`` goes through a trace as decode does and uses the very policies of the runtime, with the bookkeeping of
slots left out; tests hold that its hits are those of ``SlotCache``. Numbers only: no torch, no files, no clock.
Memory: 4 bytes for each (token, prototype) of one group of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from conmoe_edge.checkpoint.format.manifest import CacheSettings, Manifest
from conmoe_edge.offload.residency.policies import (
    POLICIES,
    LayoutTable,
    check_policy,
    make_policy,
    pins_of,
    tables,
    warm_order,
)
from conmoe_edge.offload.residency.quota import allot, miss_curve
from conmoe_edge.plan.trace import PrototypeTrace, Row

PIN_SHARES = (0.25, 0.5)
_MOST_REQUESTS = 1 << 18  # of a replay; a longer trace gives some of its sequences


def replay(
    rows: Iterable[Row], settings: CacheSettings, table: LayoutTable, count_from: int = 0
) -> tuple[int, int]:
    """(hits, requests) of the passes ``rows`` in order, from the pass ``count_from`` on.

    The same decisions as ``SlotCache`` with passes that compute first what is there.
    """
    pins = frozenset(pins_of(settings, table))
    policy = make_policy(settings, table)
    warm = [n for n in warm_order(settings, table) if n not in pins][: settings.slots - len(pins)]
    for number in reversed(warm):
        policy.enter(number)
    resident = set(warm)
    room = settings.slots - len(pins)
    hits = asked = 0
    enter, touch, evict, all_there = policy.enter, policy.touch, policy.evict, resident.issuperset
    for position, asking in enumerate(rows):
        # Pins are always there.
        row = asking if not pins else [n for n in asking if n not in pins]
        counted = position >= count_from
        asked += len(asking) if counted else 0
        if all_there(row):
            hits += len(asking) if counted else 0
            touch(row)
            continue
        missing = [n for n in row if n not in resident]
        hits += len(asking) - len(missing) if counted else 0
        turn = [n for n in row if n in resident] + missing  # computed in this order
        locked = set(row)
        done = 0
        for number in missing:
            while len(resident) >= room:
                victim = evict(number, locked)
                if victim is not None:
                    resident.remove(victim)
                    break
                # Everything is still needed: what comes first is computed, and may go then.
                touch(turn[done : done + 1])
                locked.remove(turn[done])
                done += 1
            resident.add(number)
            enter(number)
        touch(turn[done:])
    return hits, asked


def choose(
    trace: PrototypeTrace, manifest: Manifest, slots: Sequence[int], only: str | None = None
) -> tuple[CacheSettings, ...]:
    """The best settings for every layout's slots; empty where every prototype has a slot.

    Args:
        trace: requests for the package's prototypes.
        manifest: of the package.
        slots: cache slots of every record layout.
        only: a policy to take whatever the replay says (its pin share and quotas are still chosen).
    """
    check_policy(only)
    every = tables(manifest)
    if all(count >= len(table.members) for count, table in zip(slots, every, strict=True)):
        return ()
    return tuple(
        _choose_one(trace, table, count, only, mixed=len(every) > 1)
        for table, count in zip(every, slots, strict=True)
    )


def _choose_one(
    trace: PrototypeTrace, table: LayoutTable, slots: int, only: str | None, *, mixed: bool
) -> CacheSettings:
    if slots >= len(table.members):
        return CacheSettings(slots, only or "lru")
    if mixed:
        members = frozenset(table.members)
        trace = trace.only([n in members for n in range(len(table.weights))])
    trace = trace.every(-(-trace.requests // _MOST_REQUESTS) or 1)
    rows = [row for _, row in trace.decode()]
    middle = sum(1 for _ in trace.decode(stop=trace.tokens // 2))
    tried: list[tuple[int, str, CacheSettings]] = []
    asked = 0
    for name, settings in _candidates(trace, table, slots, trace.tokens // 2, only):
        hits, asked = replay(rows, settings, table, middle)
        tried.append((hits, name, settings))
    most, _, best = max(tried, key=lambda one: one[0])  # the first of equals: the simplest
    if best.policy == "layer-lru":
        best = replace(best, quotas=_quotas(trace, table, slots, trace.tokens))
    return replace(
        best,
        predicted_hit=most / asked if asked else None,
        candidates={name: hits / asked for hits, name, _ in tried} if asked else {},
    )


def _candidates(
    trace: PrototypeTrace, table: LayoutTable, slots: int, stop: int, only: str | None
) -> list[tuple[str, CacheSettings]]:
    found = []
    for policy in POLICIES if only is None else (only,):
        if policy == "pins":
            found += [
                (f"pins {share:.0%}", CacheSettings(slots, policy, share)) for share in PIN_SHARES
            ]
        elif policy == "layer-lru":
            quotas = _quotas(trace, table, slots, stop)
            found.append((policy, CacheSettings(slots, policy, quotas=quotas)))
        else:
            found.append((policy, CacheSettings(slots, policy)))
    return found


def _quotas(trace: PrototypeTrace, table: LayoutTable, slots: int, stop: int) -> tuple[int, ...]:
    """Quotas by the miss curves of the first ``stop`` tokens; every group gets what a token asks of it at once."""
    sizes = table.group_sizes
    passes: list[list[Row]] = [[] for _ in sizes]
    for _, row in trace.decode(stop=stop):
        passes[table.group_of[row[0]]].append(row)
    gains, least = [], []
    for size, rows in zip(sizes, passes, strict=True):
        curve = miss_curve(rows, size)
        gains.append([before - after for before, after in pairwise(curve)])
        least.append(max((len(row) for row in rows), default=0))
    return allot(gains, slots, least)
