"""A prompt whose prototypes come from the disk, beside what disk and processor allow, on OLMoE-1B-7B's widths.

    python -m benchmarks.prompt_from_disk                   # makes its package in a temporary folder, about 1 GB
    python -m benchmarks.prompt_from_disk --layers 8 --precision q3 --tokens 2048

The package has random numbers (``comparison/random_package.py``) and a chunk as long as the prompt. It is opened with
a cache slot for every prototype, and for a share of them. Prompts of random tokens go through in turns: with all
resident, and from the disk with and without reading a layer ahead, directly where the system can. One bound is the same
prompt with all resident, which is what the products take here. The other is what the same threads take to read the same
records with nothing else to do. The share is the larger of both over the seconds. Printed are medians; no record may
be read twice in a chunk, and scores are those of all resident, to the bit.

Peak memory: the package one and a third times, and the activations of the longest prompt.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.random_package import write
from benchmarks.make_olmoe_shape import Shape
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.storage.slot_pool import host_buffer
from conmoe_edge.offload.storage.transfer import READERS, DirectTransfer

LAYERS, VOCAB = 4, 4096


class NothingAhead:
    """In place of ``NextScan``: nothing is read for the layer that comes next."""

    def after(self, layer: int, asked: int) -> Sequence[int]:
        """Nothing."""
        return ()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Prompts from the disk, beside their bounds.")
    parser.add_argument(
        "--folder", type=Path, help="where the package is kept; else a temporary one"
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--precision", default="int4", help="of the records")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the prototypes with a slot")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    print(
        "tokens  chunk  ahead  seconds  all there  disk  reads/record  MiB read  share of the bound"
    )
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        package = folder / f"{given.precision}-{given.layers}"
        if not package.exists():
            shape = Shape(layers=given.layers, vocab=VOCAB)
            write(dict(shape.config()), package, given.precision, "q4")
        for tokens in given.tokens:
            save_manifest(package, replace(load_manifest(package), prefill_chunk=tokens))
            measure(package, tokens, given.share, given.turns)


def measure(package: Path, tokens: int, share: float, turns: int) -> None:
    """Prompts of one length."""
    with ExitStack() as stack:
        every: Any = load_package(package, device="cpu", context=tokens + 1)
        stack.callback(every.conmoe.close)
        slots = (max(1, round(share * len(every.conmoe.manifest.prototypes))),)
        some: Any = load_package(package, device="cpu", context=tokens + 1, slots=slots)
        stack.callback(some.conmoe.close)
        store, residency = some.conmoe._store, some.conmoe.residency
        store.read_direct()
        reads: Counter[int] = Counter()
        own = store.read_into

        def counted(number: int, target: Tensor) -> None:
            reads[number] += 1
            own(number, target)

        store.read_into = counted
        ways = {"yes": residency._next_scan, "no": NothingAhead()}
        draw = Random(0)
        rows: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
        for turn in range(1 + turns):
            text = [draw.randrange(VOCAB) for _ in range(tokens)]
            right, computing = answered(every, text)
            for way, scans in ways.items():
                residency._next_scan = scans
                reads.clear()
                found, seconds = answered(some, text)
                most, read = max(reads.values(), default=0), sum(reads.values())
                if most > 1:
                    raise SystemExit(f"a record was read {most} times in one chunk")
                if not torch.equal(found, right):
                    raise SystemExit("other scores than with all prototypes")
                disk = reading(store, own, list(reads), residency.pools[0].layout.nbytes)
                if turn:  # the first of them warms up
                    rows[way].append((seconds, computing, disk, read, most))
        record = residency.pools[0].layout.nbytes
        for way, taken in rows.items():
            seconds, computing, disk, read, most = map(statistics.median, zip(*taken, strict=True))
            print(
                f"{tokens:6} {some.conmoe.prefill_chunk:6}  {way:>5} {seconds:8.2f} {computing:10.2f} {disk:5.2f} "
                f"{most:13.0f} {read * record / 2**20:9.0f} {100 * max(computing, disk) / seconds:17.0f} %",
                flush=True,
            )


def answered(model: Any, text: list[int]) -> tuple[Tensor, float]:
    """The scores behind a prompt, and the seconds that it took."""
    cached = CachedTokens(model, model.conmoe.prefill_chunk)
    start, scores = time.perf_counter(), None
    while scores is None:
        scores = cached.step(text, len(text))
    return scores, time.perf_counter() - start


def reading(store: Any, read: Any, numbers: list[int], nbytes: int) -> float:
    """Seconds for these records by the transfer's threads, with nothing else to do."""
    store.read_into, counted = read, store.read_into
    transfer, rooms = DirectTransfer(store), [host_buffer(nbytes) for _ in range(2 * READERS)]
    start = time.perf_counter()
    for turn, number in enumerate(numbers):
        place = (0, turn % len(rooms))
        transfer.wait(place)
        transfer.load(number, place, rooms[place[1]])
    transfer.drain()
    seconds = time.perf_counter() - start
    transfer.close()
    store.read_into = counted
    return seconds


if __name__ == "__main__":
    main()
