"""Prototypes computed by the processor where they lie in the host's page-locked memory, while the GPU has other work.

``HostCompute.choose`` says which of the missing ones (``miss_split.py``), ``outputs`` computes them. Only records that
``HostTier`` holds: one that is on the disk has to be read anyway, and is copied.

What a copy and a product cost is measured once, at the first choice: medians over some records, so that none of them
comes from a cache. Memory: one token's activations and outputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.format.records import view
from conmoe_edge.offload.compute.miss_split import MissCosts
from conmoe_edge.offload.compute.torch_backend import Arithmetic
from conmoe_edge.offload.storage.pinned_tier import HostTier
from conmoe_edge.offload.storage.stored_expert import StoredExpert

_TRIALS = 9


class HostCompute:
    """The records of a ``HostTier`` as experts.

    ``computed``: how many prototypes were, since the start or the last reset.
    """

    def __init__(self, host: HostTier, manifest: Manifest) -> None:
        """Nothing is measured before the first ``choose``."""
        self.computed = 0
        self.costs: MissCosts | None = None
        self._host = host
        self._arithmetic = Arithmetic(torch.device("cpu"))
        self._layouts = [manifest.layouts[one.layout] for one in manifest.prototypes]
        self._weights = [one.weight for one in manifest.prototypes]
        self._experts: dict[int, StoredExpert] = {}

    def choose(self, module: nn.Module, missing: Sequence[int], hidden: Tensor) -> list[int]:
        """Those of ``missing`` that the processor should compute: of the ones that it can, those with the least routing
        weight in calibration, since the others are more likely to be asked for again.

        Args:
            module: the experts module.
            missing: prototype numbers.
            hidden: [1, H] on the GPU.
        """
        held = [number for number in missing if self._host.record(number) is not None]
        if not held:
            return []
        if self.costs is None:
            self.costs = self._measure(module, hidden)
        lightest = sorted(held, key=lambda number: (self._weights[number], number))
        return lightest[: self.costs.aside(len(missing))]

    def outputs(self, module: nn.Module, numbers: Sequence[int], hidden: Tensor) -> Tensor:
        """[1, H] on the processor -> fp32 [n, H], outputs of the prototypes that ``choose`` has named."""
        self.computed += len(numbers)
        return self._arithmetic.one_token(module, [self._expert(n) for n in numbers], hidden)

    def _expert(self, number: int) -> StoredExpert:
        found = self._experts.get(number)
        if found is None:
            found = StoredExpert(view(self._layouts[number], self._record(number)))
            self._experts[number] = found
        return found

    def _record(self, number: int) -> Tensor:
        record = self._host.record(number)
        if record is None:
            raise RuntimeError(f"the record of prototype {number} is not in the host's memory")
        return record

    def _measure(self, module: nn.Module, hidden: Tensor) -> MissCosts:
        numbers = self._host.numbers[:_TRIALS]
        largest = max(numbers, key=lambda number: self._layouts[number].nbytes)
        there = torch.empty(self._layouts[largest].nbytes, dtype=torch.uint8, device=hidden.device)
        on_host = hidden.cpu()

        def copy(number: int) -> None:
            record = self._record(number)
            there[: record.numel()].copy_(record, non_blocking=True)

        def compute(number: int) -> None:
            self._arithmetic.one_token(module, [self._expert(number)], on_host)

        def detour(number: int) -> None:
            hidden.cpu().to(hidden.device)

        for once in (copy, compute, detour):  # what happens the first time only
            once(numbers[0])
        return MissCosts(
            copy=_median(copy, numbers, hidden.device),
            compute=_median(compute, numbers, hidden.device),
            detour=_median(detour, numbers, hidden.device),
        )


def _median(run: Callable[[int], None], numbers: Sequence[int], device: torch.device) -> float:
    seconds = []
    for number in numbers:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        run(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)
