"""The constants of the speed model (``REACH`` in conmoe_edge/plan/speed.py), from packages that run.

    python -m benchmarks.speed_constants --tiny DIR --bf16 DIR [--int8 DIR] [--int4 DIR] [--mxfp4 DIR] [--q4 DIR]
        [--q3 DIR] [--q2 DIR] [--gpu SIZE]
    python -m benchmarks.speed_constants --shape DIR --work DIR

The second makes all of them first, from a model with OLMoE's shape (``benchmarks.make_olmoe_shape``) and the demo: one
command on an idle machine. Packages that are in ``--work`` already are taken as they are.

Each package goes through ``conmoe-edge bench`` in a process of its own, all prototypes resident.
With t the seconds of a token, B the highest bandwidth that a run measured, L the layers, D and X the
dense and the routed bytes of a token:

    --tiny   a model whose bytes hardly count (the demo):  o = (t - (D + X) / (e B)) / L
    --bf16   a model whose bytes are all that counts:      e = (D + X) / (B (t - L o))
    --int8 ... --q2: the same dense part, other records:   e' = X / (B (t - L o - D / (e B)))

The first two need each other's result and are solved in turns. ``miss_seconds`` is not printed: it is what is left of
the demo's token in a budget that does not hold all of it, over its misses. An idle machine and packages of the same
model are the caller's business. Prints the constants and, with them, expected over measured; of prompts
what was expected with ``PROMPT_REACH`` (conmoe_edge/plan/prompt_speed.py), and by how much it was off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

_TURNS = 20
_QUANTISED = ("int8", "int4", "mxfp4", "q4", "q3", "q2")
_MADE = ("int8", "int4", "q4", "q3", "q2")
"""What can be fitted from a plain model; mxfp4 comes from one that has it."""
_ALL = "64GB"


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds and bytes of a token, as one bench gave them."""

    seconds: float
    dense: float
    routed: float
    layers: int
    bandwidth: float

    def without_dense(self, overhead: float, plain: float) -> float:
        """Seconds that are left for the prototypes."""
        return self.seconds - self.layers * overhead - self.dense / (plain * self.bandwidth)


def main() -> None:
    """Run, solve, print."""
    parser = argparse.ArgumentParser(description="The constants of the speed model.")
    for name in ("tiny", "bf16", *_QUANTISED):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    parser.add_argument("--shape", type=Path, metavar="DIR", help="a model to fit in every form")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where those packages go")
    parser.add_argument("--gpu", default="auto", help="budget that holds all prototypes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", default="5")
    arguments = parser.parse_args()
    if (arguments.shape is None) != (arguments.work is None):
        parser.error("--shape and --work go together")
    if arguments.shape is not None:
        make(arguments)
    if arguments.tiny is None or arguments.bf16 is None:
        parser.error("--tiny and --bf16, or --shape and --work")
    runs = {
        name: bench(folder, arguments)
        for name in ("tiny", "bf16", *_QUANTISED)
        if (folder := getattr(arguments, name)) is not None
    }
    best = max(run.bandwidth for run in runs.values())  # company can only make it less
    runs = {name: replace(run, bandwidth=best) for name, run in runs.items()}
    overhead, plain = solve(runs["tiny"], runs["bf16"])
    kernels = {"bf16": plain}
    for name in _QUANTISED:
        if name in runs:
            run = runs[name]
            kernels[name] = run.routed / (run.bandwidth * run.without_dense(overhead, plain))
    print(f"layer_seconds={overhead * 1e6:.0f}e-6")
    print("kernels=" + ", ".join(f'"{name}": {share:.2f}' for name, share in kernels.items()))


def make(arguments: argparse.Namespace) -> None:
    """The packages that are not there yet, of all experts; ``arguments`` gets their folders."""
    models = {"tiny": ("demo", "source"), "bf16": (str(arguments.shape), "bf16")}
    models |= {kind: (str(arguments.shape), kind) for kind in _MADE}
    for name, (model, precision) in models.items():
        folder = arguments.work / name
        if not folder.is_dir():
            options = ["--gpu", _ALL, "--device", "cpu", "--rate", "0", "--precision", precision]
            command = [sys.executable, "-m", "conmoe_edge", "fit", model, *options]
            command += ["--method", "conmoe", "--out", str(folder), "--yes", "--quiet"]
            if subprocess.run(command, check=False).returncode:
                sys.exit(" ".join(command))
        if getattr(arguments, name) is None:
            setattr(arguments, name, folder)


def solve(tiny: Run, large: Run) -> tuple[float, float]:
    """Seconds of a layer beside its bytes, and the share of the bandwidth that bf16 reaches."""
    overhead, share = 0.0, 1.0
    for _ in range(_TURNS):
        moved = (tiny.dense + tiny.routed) / (share * tiny.bandwidth)
        overhead = max(0.0, (tiny.seconds - moved) / tiny.layers)
        left = large.seconds - large.layers * overhead
        share = (large.dense + large.routed) / (large.bandwidth * left)
    return overhead, share


def bench(folder: Path, arguments: argparse.Namespace) -> Run:
    """One package, measured in a process of its own."""
    options = ["--json", "--quiet", "--repeats", arguments.repeats]
    options += ["--gpu", arguments.gpu, "--device", arguments.device]
    command = [sys.executable, "-m", "conmoe_edge.cli.main", "bench", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    value = json.loads(done.stdout)
    decode, moved = value["decode"], value["decode"]["bytes_per_token"]
    if moved["disk"] or moved["host"]:
        sys.exit(f"{folder}: not every prototype is resident; give more with --gpu")
    seconds = 1.0 / decode["tokens_per_second"]["median"]
    dense = value["package"]["dense_read_bytes"]
    rate = value["machine"]["memory_bandwidth"]
    print(
        f"{folder}: {1 / seconds:.2f} tokens/s, expected {value['expected']['tokens_per_second']:.2f}, "
        f"{decode['bound']['share_of_serial']:.0%} of the bound at {rate / 1e9:.1f} GB/s"
    )
    expected, prefill = value["expected"], value["prefill"]
    if expected["prompt_seconds"] is not None:
        print(
            f"    prompt of {value['settings']['prompt_tokens']} tokens: "
            f"{prefill['tokens_per_second']['median']:.1f} tokens/s, {expected['prompt_seconds']:.2f} s expected, "
            f"measured x{expected['prompt_measured_ratio']:.2f} of that speed"
        )
    return Run(seconds, dense, moved["memory"] - dense, value["package"]["layers"], rate)


if __name__ == "__main__":
    main()
