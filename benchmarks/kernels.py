"""What each CPU kernel reaches for one token: the measurement behind the rule in offload/compute/torch_backend.py.

    python -m benchmarks.kernels                   # OLMoE-1B-7B's experts: hidden 2048, width 1024
    python -m benchmarks.kernels --hidden 2880 --width 2880 --experts 16         # gpt-oss-20b's
    python -m benchmarks.kernels --kinds int4 q4 q3 q2 mxfp4 q3-q4 --tokens 4

Every kernel computes with so many experts that none is in the processor's cache, 8 at a time, best of several rounds,
the kernels taking turns. The last column is the share of what the cores read of memory, as the plan counts it.
Two kinds with a dash are those of gate and up, and of down. Peak memory: all experts in one form, 0.5 GB by default.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from conmoe_edge.checkpoint.format.forms import LOW_BITS
from conmoe_edge.checkpoint.format.quantise import Kind, Matrix, quantise, stored
from conmoe_edge.memory.bandwidth import memory_bandwidth
from conmoe_edge.offload.kernels.cpu.bindings import operator, why_not
from conmoe_edge.offload.storage.slot_pool import host_buffer

TOGETHER = 8
KINDS = ("plain", "int8", "int4", "mxfp4", "q4", "q3", "q2", "q3-q4", "q2-q3")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What each CPU kernel reaches for one token.")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1, help="rows that every expert gets")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    hidden, width, tokens = arguments.hidden, arguments.width, arguments.tokens
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if operator() is None:
        print(f"no compiled operator: {why_not()}")
    kernels = torch.ops.aten
    rate = (memory_bandwidth() or float("nan")) / 1e9
    for kind in arguments.kinds:
        first, _, second = kind.partition("-")
        ups = copies(2 * width, hidden, cast(Kind, first), arguments.experts)
        downs = copies(hidden, width, cast(Kind, second or first), arguments.experts)
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
        elif kind == "mxfp4" or first in LOW_BITS:
            ways = {}  # torch has no kernel for it
        else:
            ways = {
                "_weight_int4pack_mm_for_cpu": lambda x, m: kernels._weight_int4pack_mm_for_cpu(
                    x, m.values, m.group, m.scales
                )
            }
        runs = {
            name: by_torch(way, ups, downs, hidden) for name, way in ways.items() if tokens == 1
        }
        if operator() is not None:
            x = torch.randn(1, tokens, hidden)
            runs["operator, one by one"] = by_operator(ups, downs, x, 1)
            runs[f"operator, {TOGETHER} together"] = by_operator(ups, downs, x, TOGETHER)
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
                f"{label:5} {name:28} {nbytes / arguments.experts / 1e6:6.2f} MB "
                f"{seconds / arguments.experts * 1e3:7.3f} ms an expert {reached:6.1f} GB/s "
                f"{reached / rate:6.0%} of {rate:.1f} GB/s"
            )


def copies(rows: int, columns: int, kind: Kind, count: int) -> list[Matrix]:
    """The same random matrix at ``count`` places, as slots hold them."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    first = quantise(weight.bfloat16() if kind == "plain" else weight, kind)
    values = spread(first.values, count)
    scales = [None] * count if first.scales is None else spread(first.scales, count)
    return [stored(kind, value, scale) for value, scale in zip(values, scales, strict=True)]


def spread(tensor: Tensor, count: int) -> list[Tensor]:
    """Copies of a tensor, one after another in memory like the slots'."""
    memory = host_buffer(count * tensor.numel() * tensor.element_size())
    places = memory.view(tensor.dtype).view(count, *tensor.shape)
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
    ups: list[Matrix], downs: list[Matrix], x: Tensor, together: int
) -> Callable[[], None]:
    """All experts by the compiled operator, ``together`` at a time, for the tokens ``x`` fp32 [1, tokens, H]."""
    engine = operator()
    assert engine is not None
    pairs = [[engine.prepare(one) for one in matrices] for matrices in (ups, downs)]
    first, second = [[one for one in side if one is not None] for side in pairs]

    def run() -> None:
        for start in range(0, len(first), together):
            gate, value = engine.few_rows(first[start : start + together], x).chunk(2, -1)
            engine.few_rows(second[start : start + together], (silu(gate) * value).contiguous())

    return run


if __name__ == "__main__":
    main()
