"""What a prototype that has to be read costs an answer beside its bytes, on OLMoE-1B-7B's widths.

    python -m benchmarks.miss_cost                          # makes its package in a temporary folder, about 1 GB
    python -m benchmarks.miss_cost --width 64               # records so small that the bytes hardly count
    python -m benchmarks.miss_cost --precision q3 --folder ./package

The package has random numbers (``comparison/random_package.py``) and is opened twice, with a cache slot for every
prototype and for a share of them. Both go through the same random tokens in turns, records being read through the page
cache, where they are, or directly. For each turn the difference of both, over the misses, is what a miss costs; the
bytes' share of its processor time is what one thread takes to read such records into one buffer with nothing around the
system's call. Printed are the medians of the turns in microseconds of a miss: processor time of all threads, and the
time that answers take longer. Scores of both are compared, to the bit.

Peak memory: the package one and a half times, and the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.random_package import write
from benchmarks.make_olmoe_shape import Shape
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.storage.slot_pool import host_buffer
from conmoe_edge.system_calls import read_at

LAYERS, VOCAB, CONTEXT, PROMPT = 4, 4096, 256, 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a miss costs beside its bytes.")
    parser.add_argument("--folder", type=Path, help="the package; made where there is none")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=Shape.expert_width, help="of an expert")
    parser.add_argument("--precision", default="int4", help="of the records")
    parser.add_argument("--share", type=float, default=0.5, help="of the prototypes with a slot")
    parser.add_argument("--tokens", type=int, default=32, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "p"
        if not folder.exists():
            shape = Shape(layers=given.layers, expert_width=given.width, vocab=VOCAB)
            write(dict(shape.config()), folder, given.precision, "q4")
        every: Any = load_package(folder, device="cpu", context=CONTEXT)
        stack.callback(every.conmoe.close)
        count = len(every.conmoe.manifest.prototypes)
        slots = (max(1, round(given.share * count)),)
        some: Any = load_package(folder, device="cpu", context=CONTEXT, slots=slots)
        stack.callback(some.conmoe.close)
        measure(every, some, given.tokens, given.turns)


def measure(every: Any, some: Any, tokens: int, turns: int) -> None:
    """``every`` has all prototypes, ``some`` has not."""
    store, residency = some.conmoe._store, some.conmoe.residency
    record = some.conmoe.manifest.layouts[0].nbytes
    print(
        f"{torch.get_num_threads()} threads, {some.conmoe.stats().kernel}; records of {record:,} bytes, "
        f"{residency.resident_count} of {residency.count} have a slot; microseconds of a miss"
    )
    print("reads     misses/token  processor  of it bytes    rest     time")
    ways: dict[str, Callable[[], Any]] = {"buffered": store.read_buffered}
    if store.read_direct():
        ways["direct"] = store.read_direct
    draw = Random(0)
    rows: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for turn in range(1 + turns):
        text = [draw.randrange(VOCAB) for _ in range(PROMPT + tokens)]
        for way, choose in ways.items():
            choose()
            right, *base = answered(every, text)
            before = residency.misses
            found, *taken = answered(some, text)
            misses = residency.misses - before
            if not torch.equal(found, right):
                raise SystemExit("another answer than with all prototypes")
            raw = bytes_alone(store, residency, misses)
            if turn:  # the first of them warms up
                seconds, processor = (
                    (mine - its) / misses for mine, its in zip(taken, base, strict=True)
                )
                rows[way].append((misses, processor, raw, seconds))
    for way, found in rows.items():
        misses, processor, raw, seconds = map(statistics.median, zip(*found, strict=True))
        print(
            f"{way:9} {misses / (tokens + 1):12.1f} {1e6 * processor:10.0f} {1e6 * raw:12.0f} "
            f"{1e6 * (processor - raw):7.0f} {1e6 * seconds:8.0f}"
        )


def answered(model: Any, text: list[int]) -> tuple[Tensor, float, float]:
    """The last scores of ``text``, whose first ``PROMPT`` tokens are a prompt; seconds and processor seconds of the
    others.
    """
    cached = CachedTokens(model, model.conmoe.prefill_chunk)
    cached.step(text[:PROMPT], PROMPT)
    scores = None
    start = time.perf_counter(), time.process_time()
    for end in range(PROMPT + 1, len(text) + 1):
        scores = cached.step(text[:end], PROMPT)
    taken = time.perf_counter() - start[0], time.process_time() - start[1]
    assert scores is not None, "all tokens are in"
    return scores, *taken


def bytes_alone(store: Any, residency: Any, count: int) -> float:
    """Processor seconds of a record's reading, the system's call alone, from places spread over the package."""
    pool, numbers = residency.pools[0], Random(1).choices(range(store.count), k=min(count, 64))
    handles = store._direct if store.mode == "direct" else store._files
    room = memoryview(host_buffer(pool.layout.nbytes).numpy())  # type: ignore[arg-type]
    start = time.process_time()
    for number in numbers:
        entry = store._prototypes[number]
        read_at(handles[entry.file], room, entry.offset, store._lock)
    return (time.process_time() - start) / len(numbers)


if __name__ == "__main__":
    main()
