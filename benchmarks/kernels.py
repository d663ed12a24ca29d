"""What each CPU kernel reaches for one token: the measurement behind the rule in offload/compute/torch_backend.py.

    python -m benchmarks.kernels                   # OLMoE-1B-7B's experts: hidden 2048, width 1024
    python -m benchmarks.kernels --hidden 2880 --width 2880

Every kernel computes the same 8 experts of 40 (so that none is in the processor's cache), best of several rounds, the
kernels taking turns. The last column is the share of the rate at which the same threads read one long matrix. Peak
memory: 40 experts in bf16, 0.5 GB for the default.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from conmoe_edge.checkpoint.format.quantise import Kind, Matrix, quantise, stored
from conmoe_edge.offload.kernels.cpu.bindings import operator, why_not
from conmoe_edge.offload.storage.slot_pool import host_buffer

EXPERTS, TOGETHER = 40, 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What each CPU kernel reaches for one token.")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    hidden, width = arguments.hidden, arguments.width
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if operator() is None:
        print(f"no compiled operator: {why_not()}")
    kernels = torch.ops.aten
    rate = read_rate()
    for kind in ("plain", "int8", "int4", "mxfp4"):
        ups, downs = copies(2 * width, hidden, kind), copies(hidden, width, kind)
        nbytes = sum(one.nbytes for one in (*ups, *downs))
        if kind == "plain":
            ways: dict[str, Callable[[Tensor, Matrix], Tensor]] = {
                "linear": lambda x, m: linear(x, m.values),
                "mv": lambda x, m: torch.mv(m.values, x[0]).unsqueeze(0),
            }
        elif kind == "int8":
            ways = {
                "_weight_int8pack_mm": lambda x, m: kernels._weight_int8pack_mm(
                    x, m.values, m.scales
                )
            }
        elif kind == "mxfp4":
            ways = {}  # torch has no kernel for it
        else:
            ways = {
                "_weight_int4pack_mm_for_cpu": lambda x, m: kernels._weight_int4pack_mm_for_cpu(
                    x, m.values, m.group, m.scales
                )
            }
        runs = {name: by_torch(way, ups, downs, hidden) for name, way in ways.items()}
        if operator() is not None:
            runs["operator, one by one"] = by_operator(ups, downs, hidden, 1)
            runs[f"operator, {TOGETHER} together"] = by_operator(ups, downs, hidden, TOGETHER)
        best = {name: float("inf") for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
        for name, seconds in best.items():
            reached = nbytes / seconds / 1e9
            label = {"plain": "bf16"}.get(kind, kind)
            print(
                f"{label:5} {name:28} {seconds / EXPERTS * 1e3:7.3f} ms an expert {reached:6.1f} GB/s "
                f"{reached / rate:6.0%} of {rate:.1f} GB/s"
            )


def read_rate() -> float:
    """GB/s at which the threads read memory: the best product of a long matrix and a vector."""
    columns = 2048
    matrix = host_buffer(1 << 29).view(torch.bfloat16).view(-1, columns)
    vector = torch.ones(columns, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - start)
    return matrix.numel() * 2 / best / 1e9


def copies(rows: int, columns: int, kind: Kind) -> list[Matrix]:
    """The same random matrix at ``EXPERTS`` places, as slots hold them."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    first = quantise(weight.bfloat16() if kind == "plain" else weight, kind)
    values = spread(first.values)
    scales = [None] * EXPERTS if first.scales is None else spread(first.scales)
    return [stored(kind, value, scale) for value, scale in zip(values, scales, strict=True)]


def spread(tensor: Tensor) -> list[Tensor]:
    """Copies of a tensor, one after another in memory like the slots'."""
    memory = host_buffer(EXPERTS * tensor.numel() * tensor.element_size())
    places = memory.view(tensor.dtype).view(EXPERTS, *tensor.shape)
    places.copy_(tensor.expand_as(places))
    return list(places)


def by_torch(
    way: Callable[[Tensor, Matrix], Tensor], ups: list[Matrix], downs: list[Matrix], hidden: int
) -> Callable[[], None]:
    """All experts, one by one, in bf16."""
    x = torch.randn(1, hidden).bfloat16()

    def run() -> None:
        for up, down in zip(ups, downs, strict=True):
            gate, value = way(x, up).chunk(2, -1)
            way(silu(gate) * value, down)

    return run


def by_operator(
    ups: list[Matrix], downs: list[Matrix], hidden: int, together: int
) -> Callable[[], None]:
    """All experts by the compiled operator, ``together`` at a time."""
    engine = operator()
    assert engine is not None
    x = torch.randn(1, 1, hidden)
    pairs = [[engine.prepare(one) for one in matrices] for matrices in (ups, downs)]
    first, second = [[one for one in side if one is not None] for side in pairs]

    def run() -> None:
        for start in range(0, EXPERTS, together):
            gate, value = engine.few_rows(first[start : start + together], x).chunk(2, -1)
            engine.few_rows(second[start : start + together], (silu(gate) * value).contiguous())

    return run


if __name__ == "__main__":
    main()
