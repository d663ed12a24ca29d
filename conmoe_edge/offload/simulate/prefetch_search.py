"""Does reading ahead pay? Decode replayed against a clock, with and without it.

The tokens that the predictor was not fitted on go through the runtime's own ``Residency``: the same policy, the same
order of reads, the same prefetches. Only what takes time is replaced: records move by ``ClockedTransfer``, and a
prototype's compute and the beginning of a read add their seconds (``plan/pace.py``). The slots are on the meta
device, so nothing is read or held.

One read is under way at a time, each for bytes / bandwidth: demand reads in the order in which they begin, a prefetch
when nothing else is being read. One that is under way when a demand read comes delays it by its rest, and is waited
for where it is asked for.

Depths are tried upwards from 1 until one is no better than the one before. The best is taken if it saves ``LEAST_GAIN``
of a token's time or more; else nothing is read ahead. No stopwatch: the same package and rates give the same decision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import CacheSettings, Manifest, PrefetchSettings
from conmoe_edge.offload.residency.residency import Residency
from conmoe_edge.offload.storage.place import Place
from conmoe_edge.offload.storage.slot_pool import SlotPool
from conmoe_edge.offload.storage.transfer import TransferCounts
from conmoe_edge.plan.pace import Pace
from conmoe_edge.plan.trace import Predictions, PrototypeTrace

LEAST_GAIN = 0.03
MOST_TOKENS = 512
"""Longest replay: some tenths of a second a depth and 16 layers."""


class ClockedTransfer:
    """``Transfer`` without bytes: ``now`` is the time."""

    def __init__(self, seconds: dict[int, float], begin: float = 0.0) -> None:
        """``seconds`` of a record by its size; ``begin`` of its caller."""
        self.now = 0.0
        self._begin = begin
        self.counts = TransferCounts()
        self._seconds = seconds
        self._reads: dict[Place, tuple[float, float]] = {}  # start, end

    def load(self, number: int, place: Place, target: Tensor, *, ahead: bool = False) -> None:
        self.now += self._begin
        start = max([self.now, *(end for _, end in self._reads.values())])
        self._reads[place] = (start, start + self._seconds[target.numel()])

    def cancel(self, number: int, place: Place, target: Tensor) -> bool:
        if self._reads[place][0] <= self.now:
            return False
        del self._reads[place]
        return True

    def ready(self, place: Place) -> bool:
        return place not in self._reads or self._reads[place][1] <= self.now

    def wait(self, place: Place) -> None:
        if place in self._reads:
            self.now = max(self.now, self._reads.pop(place)[1])

    def used(self, place: Place) -> None:
        """Nothing is kept."""

    def drain(self) -> None:
        self._reads.clear()

    def close(self) -> None:
        """There is nothing to close."""


def token_seconds(
    trace: PrototypeTrace,
    predictions: Predictions,
    manifest: Manifest,
    settings: Sequence[CacheSettings],
    pace: Pace,
    depth: int,
    window: int,
) -> float:
    """Mean time of a predicted token with ``depth`` prototypes of the ``window`` likeliest read ahead."""
    meta = torch.device("meta")
    pools = [
        SlotPool(layout, one.slots, meta)
        for layout, one in zip(manifest.layouts, settings, strict=True)
    ]
    layouts = zip(manifest.layouts, pace.read, strict=True)
    transfer = ClockedTransfer({layout.nbytes: seconds for layout, seconds in layouts}, pace.begin)
    residency = Residency(manifest, pools, transfer, settings)
    residency.preload()
    residency.most_ahead = depth
    compute_seconds = [pace.compute[entry.layout] for entry in manifest.prototypes]
    transfer.now = 0.0
    last = len(trace.layers) - 1
    tokens = list(zip(range(MOST_TOKENS), predictions.tokens, strict=False))
    for row, token in tokens:
        for position, asked in enumerate(trace.asked):
            transfer.now += pace.before[position]
            numbers = asked[token]
            if not numbers:
                continue
            ahead: Sequence[int] = ()
            if depth and position < last:
                ahead = predictions.ranked[position + 1][row][:window]

            def compute(
                turn: Sequence[int], experts: object = None, numbers: Sequence[int] = numbers
            ) -> None:
                transfer.now += sum(compute_seconds[numbers[at]] for at in turn)

            residency.collect()
            if residency.table.present(
                numbers
            ):  # one call, whereafter there is time for the next layer
                compute(range(len(numbers)))
                residency.asked(numbers)
                residency.prefetch(ahead)
            else:
                residency.visit(numbers, compute, ahead=ahead)
    return transfer.now / len(tokens)


def choose_prefetch(
    trace: PrototypeTrace,
    predictions: Predictions,
    manifest: Manifest,
    settings: Sequence[CacheSettings],
    pace: Pace | None,
) -> PrefetchSettings | None:
    """The depth for these slots; ``None`` where no token was predicted."""
    found = recall(trace, predictions)
    if not found:
        return None
    window = _window(trace, predictions)
    slots = sum(one.slots for one in settings)
    off = PrefetchSettings(0, window, slots / len(manifest.prototypes), None, found)
    if pace is None:
        return off
    without = token_seconds(trace, predictions, manifest, settings, pace, 0, window)
    best, least = 0, without
    for depth in range(1, window + 1):
        seconds = token_seconds(trace, predictions, manifest, settings, pace, depth, window)
        if depth > 1 and seconds >= least:
            break
        best, least = depth, seconds
    gain = 1 - least / without
    depth = best if gain >= LEAST_GAIN else 0
    return PrefetchSettings(depth, window, off.resident_share, gain, found)


def recall(trace: PrototypeTrace, predictions: Predictions) -> dict[int, float]:
    """Layer -> share of the prototypes asked for that are among as many likeliest, token by token."""
    found = {}
    for layer, asked, ranked in zip(trace.layers, trace.asked, predictions.ranked, strict=True):
        hits = wanted = 0
        for token, order in zip(predictions.tokens, ranked, strict=True):
            row = asked[token]
            wanted += len(row) if order else 0
            hits += len(set(row).intersection(order[: len(row)]))
        if wanted:
            found[layer] = hits / wanted
    return found


def _window(trace: PrototypeTrace, predictions: Predictions) -> int:
    """Prototypes that a token asks of a layer, on average."""
    counts = [len(rows[token]) for rows in trace.asked[1:] for token in predictions.tokens]
    return max(1, round(sum(counts) / len(counts)))
