"""What every consolidation method takes on a true-size checkpoint: seconds, peak memory, bytes written.

    python benchmarks/make_olmoe_shape.py --out /data/olmoe-shape --fsync
    python -m benchmarks.fit_methods --model /data/olmoe-shape --work /data/methods

Each method is a ``fit`` in a process of its own, the checkpoint's files dropped from the cache
before, its package deleted after. Weights are random, so this says nothing of quality. Results are
written after every method; one that is done with the same settings is not run again. ``--limit`` is
a hard memory limit, page cache included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import cores, forget, machine, run_child
from conmoe_edge.checkpoint.fs.atomic_files import write_json
from conmoe_edge.units import human_size, parse_size

METHODS = ("conmoe", "auto", "reap", "mone", "hc-smoe", "mergemoe", "m-smoe", "mc-smoe")
"""One of every kind: all one-shot scores take the same passes as ``reap``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table; the exit status."""
    parser = argparse.ArgumentParser(description="Every method on a true-size checkpoint.")
    parser.add_argument("--model", type=Path, required=True, help="made by make_olmoe_shape.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for one package at a time")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rate", default="50%")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--limit", type=parse_size, help="hard memory limit, e.g. 6GiB")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    path = args.results / "fit-methods.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    found["machine"] = machine()
    for method in args.methods:
        key = f"{method}|{args.rate}|{args.calibration_tokens}"
        if key not in found["cells"]:
            found["cells"][key] = run(method, args)
            write_json(path, found)
    table = report(found)
    (args.results / "fit-methods.txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    return int(any(cell["returncode"] for cell in found["cells"].values()))


def run(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One fit on a cold cache."""
    out = args.work / f"package-{method.replace('+', '-')}"
    forget(sorted(args.model.glob("*.safetensors")))
    child = run_child(
        [
            *(sys.executable, "-m", "conmoe_edge.cli.main", "fit", str(args.model)),
            *("--gpu", "64GiB", "--device", "cpu", "--out", str(out), "--method", method),
            *("--rate", args.rate, "--calibration-tokens", str(args.calibration_tokens)),
            *([] if method == "mc-smoe" else ["--precision", "source"]),
            *("--offline", "--fresh", "--overwrite", "--yes", "--json"),
        ],
        args.limit,
    )
    made: dict[str, Any] = json.loads(child.stdout) if child.returncode == 0 else {}
    shutil.rmtree(out, ignore_errors=True)
    return {
        "method": method,
        "rate": args.rate,
        "calibration_tokens": args.calibration_tokens,
        "returncode": child.returncode,
        "seconds": child.seconds,
        "cpu_seconds": child.cpu_seconds,
        "peak_rss": child.peak_rss,
        "peak_anonymous": child.peak_anonymous,
        "cgroup_peak": child.cgroup_peak,
        "limit": child.limit,
        "threads": threads(),
        "bytes_written": made.get("bytes_written"),
        "parts": made.get("seconds", {}),
        "notes": made.get("notes", []),
    }


def threads() -> int:
    """What a fit computes with: a run that is told or pinned to one is not to be compared with others."""
    return int(os.environ.get("OMP_NUM_THREADS") or cores())


def report(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{'method':10} {'rate':>5} {'tokens':>7} {'threads':>7} {'seconds':>8} {'cpu s':>8} "
        f"{'peak resident':>13} {'not of files':>12} {'written':>10}  slowest parts"
    ]
    for cell in found["cells"].values():
        slowest = sorted(cell["parts"].items(), key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in slowest)
        written = cell["bytes_written"]
        lines.append(
            f"{cell['method']:10} {cell['rate']:>5} {cell['calibration_tokens']:>7,} "
            f"{cell['threads']:7d} "
            f"{cell['seconds']:8.0f} {cell['cpu_seconds']:8.0f} "
            f"{human_size(cell['peak_rss']):>13} {human_size(cell['peak_anonymous']):>12} "
            f"{'failed' if written is None else human_size(written):>10}  {parts}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
