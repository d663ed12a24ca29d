"""Independent steps of a fit on several threads at a time, each with its share of torch's threads.

One expert's large products torch divides among its threads; what lies between them (columns that are rounded, factors,
gathered rows) is small, and the second processor waits there. So experts go side by side instead. A step is computed by
one thread in its own order, and results stand in the order of the items: nothing depends on which thread was faster.

Peak memory: what one step takes, ``MOST`` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from conmoe_edge.memory.heap import Trimming

One = TypeVar("One")
Found = TypeVar("Found")

MOST = 2
"""Steps at a time. More would take more memory, and of many processors torch makes use inside a step."""


def side_by_side(step: Callable[[One], Found], items: Iterable[One]) -> list[Found]:
    """``step`` of each of ``items``, the heap trimmed between them (``memory/heap.py``).

    One after another wherever torch has a single thread.

    Raises:
        Exception: what a step has raised, of several that of the first item.
    """
    trimming, threads = Trimming(), torch.get_num_threads()
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()  # of this thread alone

    def one(item: One) -> Found:
        trimming.look()
        with torch.inference_mode(modes[0]), torch.set_grad_enabled(modes[1]):
            return step(item)

    if threads < MOST:
        return [one(item) for item in items]
    share = threads // MOST
    try:
        with ThreadPoolExecutor(MOST, "expert", torch.set_num_threads, (share,)) as pool:
            return list(pool.map(one, items))
    finally:
        # Of the library of products it is one number for all threads.
        torch.set_num_threads(threads)
