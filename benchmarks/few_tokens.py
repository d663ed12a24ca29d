"""From how many tokens of an expert on the products of many tokens take less time than the kernels of single tokens:
the measurement behind ``few_tokens`` in ``offload/kernels/cpu/csrc/many_rows.h``.

    python -m benchmarks.few_tokens                                   # OLMoE-1B-7B's experts: hidden 2048, width 1024
    python -m benchmarks.few_tokens --hidden 2880 --width 2880 --experts 8 --kinds mxfp4          # gpt-oss-20b's

Every expert gets the same number of tokens, in one call for all: so many that none is in the processor's caches.
Seconds are those of the processor, of one thread, both ways taking turns, the best of several rounds. Peak memory: all
experts in one form, 0.3 GB by default.
"""

from __future__ import annotations

import argparse
import time
from typing import cast

import torch

from benchmarks.kernels import KINDS, copies
from conmoe_edge.checkpoint.format.quantise import Kind
from conmoe_edge.offload.kernels.cpu.bindings import operator, why_not

_ALL = 1 << 30


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Few tokens of an expert, two ways.")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=24)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8])
    quantised = [kind for kind in KINDS if kind != "plain"]
    parser.add_argument("--kinds", nargs="+", choices=quantised, default=quantised)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    engine = operator()
    if engine is None:
        raise SystemExit(f"no compiled operator: {why_not()}")
    torch.set_num_threads(1)
    count, hidden = arguments.experts, arguments.hidden
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, one thread, milliseconds of an expert: as single tokens, as many, "
        "and their ratio"
    )
    for kind in arguments.kinds:
        first, _, second = kind.partition("-")
        matrices = (
            copies(2 * arguments.width, hidden, cast(Kind, first), count),
            copies(hidden, arguments.width, cast(Kind, second or first), count),
        )
        prepared = [[engine.prepare(one) for one in side] for side in matrices]
        ups, downs = [[one for one in side if one is not None] for side in prepared]
        for tokens in arguments.tokens:
            x, out = torch.randn(32, hidden).bfloat16(), torch.zeros(32, hidden)
            rows = torch.cat([torch.randperm(32)[:tokens].sort().values for _ in range(count)])
            routed = ([tokens * i for i in range(count + 1)], rows, torch.rand(len(rows)))
            best = {_ALL: float("inf"), 0: float("inf")}
            for _ in range(arguments.rounds):
                for few in best:
                    start = time.process_time()
                    engine.many_experts(ups, downs, x, routed, out, few=few)
                    best[few] = min(best[few], time.process_time() - start)
            single, many = (1e3 * seconds / count for seconds in best.values())
            print(f"{kind:6} {tokens:3} {single:8.3f} {many:8.3f} {single / many:6.2f}", flush=True)


if __name__ == "__main__":
    main()
