"""One installation's operator beside another's, in turns: the library of a wheel beside the one compiled here, an old
state beside a new one.

    python -m venv /tmp/wheel && /tmp/wheel/bin/pip install dist/conmoe_edge-*-manylinux_2_28_x86_64.whl
    python -m benchmarks.library_turns /tmp/wheel/bin/python

A product of every stored form with 1, 4, 64 and 256 tokens, one thread. Each figure is the least processor time of
many calls over all turns, so that other work on the machine hardly matters. The ratio is the other's time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = ("int8", "int4", "q6", "q4", "q3", "q2")
TOKENS = (1, 4, 64, 256)
SIZE = 2048
"""Rows and columns of the matrix."""
CALLS, CALLS_OF_MANY = 40, 8


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("other", nargs="?", help="the Python that has the other installation")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--times", action="store_true", help="print this one's own times as JSON")
    asked = parser.parse_args()
    if asked.times:
        print(json.dumps(times()))
        return
    if asked.other is None:
        parser.error("the other Python is missing")
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for _ in range(asked.turns):
        for best, python in zip(found, (sys.executable, asked.other), strict=True):
            for name, value in _times_of(python).items():
                best[name] = value if name == "operator" else min(value, best.get(name, value))
    print("\n".join(lines(*found)))


def times() -> dict[str, Any]:
    """Microseconds of processor for each form and number of tokens, and which operator it was."""
    import torch

    from conmoe_edge.checkpoint.format.quantise import quantise
    from conmoe_edge.offload.compute.torch_backend import MANY_ROWS
    from conmoe_edge.offload.kernels.cpu.bindings import operator
    from conmoe_edge.offload.kernels.cpu.build import found_library

    torch.set_num_threads(1)
    engine = operator()
    if engine is None:
        raise SystemExit("there is no operator here; `conmoe-edge doctor` says why")
    drawn = torch.Generator().manual_seed(0)
    weight = (torch.randn(SIZE, SIZE, generator=drawn) * 0.02).bfloat16()
    library = found_library()
    found: dict[str, Any] = {"operator": f"{library.level}, {library.made_by}"}
    for kind in KINDS:
        prepared = engine.prepare(quantise(weight, kind))
        assert prepared is not None, "the operator takes every form of KINDS"
        for tokens in TOKENS:
            x = torch.randn(tokens, SIZE, generator=drawn).bfloat16()
            best = float("inf")
            for _ in range(CALLS if tokens < MANY_ROWS else CALLS_OF_MANY):
                started = time.thread_time()
                if tokens < MANY_ROWS:
                    engine.few_rows([prepared], x.unsqueeze(0))
                else:
                    engine.many_rows(prepared, x)
                best = min(best, time.thread_time() - started)
            found[f"{kind} {tokens}"] = 1e6 * best
    return found


def _times_of(python: str) -> dict[str, Any]:
    # From a folder of its own: the source beside this file would win over what `python` has installed.
    ours = python == sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not ours:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, *(["-P"] if not ours else []), str(Path(__file__)), "--times"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1] if ours else Path("/"),
    )
    if done.returncode:
        raise SystemExit(f"{python} could not be measured: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def lines(ours: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The table."""
    out = [f"here: {ours['operator']}", f"other: {other['operator']}", ""]
    out.append(f"{'form':6}" + "".join(f"{f'{n} tokens':>26}" for n in TOKENS))
    for kind in KINDS:
        row = f"{kind:6}"
        for tokens in TOKENS:
            a, b = ours[f"{kind} {tokens}"], other[f"{kind} {tokens}"]
            row += f"{a:10.0f}{b:9.0f} us {b / a:4.2f}"
        out.append(row)
    ratios = [other[name] / ours[name] for name in ours if name != "operator"]
    out += ["", f"other over here: {min(ratios):.2f} to {max(ratios):.2f}"]
    return out


if __name__ == "__main__":
    main()
