"""Make one package of this project for the comparison, as ``conmoe-edge fit`` does, with replayed routes.

    python -m benchmarks.comparison.packages --model DIR --out DIR --trace FILE --rate 0.5 --precision bf16

The trace (``traces.py``) takes the place of the router's choice while ``fit`` looks at its
calibration text, so that weights, pins and quotas in the manifest come from routes like those that
are measured, over other text. Few calibration tokens are enough: the weights are random.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from pathlib import Path

import torch
from torch import nn

import conmoe_edge
from benchmarks.comparison.traces import Replay
from conmoe_edge.compress.stream import expert_hooks as taps


class InOrder:
    """Layer numbers by order of appearance: ``fit`` streams the layers from the first to the last, more than once."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._seen: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._count = 0

    def __call__(self, module: nn.Module) -> int:
        if module not in self._seen:
            self._seen[module] = self._count % self._layers
            self._count += 1
        return self._seen[module]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--dense-precision", default="source")
    parser.add_argument("--budget", required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--calibration-tokens", type=int, required=True)
    args = parser.parse_args()
    routes = torch.load(args.trace, weights_only=True)["routes"]
    replay = Replay(taps._forward, routes, InOrder(len(routes)))
    taps._forward = replay  # what taps.register() hands to transformers
    conmoe_edge.fit(
        str(args.model),
        args.out,
        budget=args.budget,
        device="cpu",
        context=args.context,
        rate=args.rate,
        scope=1,
        precision=args.precision,
        dense_precision=args.dense_precision,
        min_resident=0.0,
        offline=True,
        calibration_tokens=args.calibration_tokens,
        overwrite=True,
        progress=lambda step: print(step, file=sys.stderr),
    )
    if not replay.calls:
        sys.exit("the routes were not replayed: another experts function ran")


if __name__ == "__main__":
    main()
