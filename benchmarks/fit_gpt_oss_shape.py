"""What ``fit`` of a true-size MXFP4 checkpoint takes: seconds by part, most memory, bytes written.

    python -m benchmarks.make_gpt_oss_shape --out /data/gpt-oss-shape
    python -m benchmarks.fit_gpt_oss_shape --model /data/gpt-oss-shape --gpu 16GB --out /data/gpt-oss-16
    python -m benchmarks.fit_gpt_oss_shape --model /data/gpt-oss-shape --gpu 8GB --out /data/gpt-oss-8 --limit 24GiB

``fit`` runs in a process of its own, on a cold page cache. ``--limit`` is enforced by a memory cgroup: page cache
counts, there is no swap. The package stays. Results are written to ``results/``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Child, forget, machine, run_child
from conmoe_edge.units import human_size, parse_size

RESULTS = Path(__file__).resolve().parent / "results"


def fit(args: argparse.Namespace) -> Child:
    """Run ``fit`` to its end."""
    forget(sorted(args.model.glob("*.safetensors")))
    command = [
        *(sys.executable, "-m", "conmoe_edge", "fit", str(args.model)),
        *("--gpu", args.gpu, "--device", "cpu", "--out", str(args.out)),
        *("--calibration-tokens", str(args.calibration_tokens)),
        *("--offline", "--overwrite", "--yes", "--json"),
        *args.fit_args,
    ]
    return run_child(command, args.limit)


def facts_of(child: Child, model: Path, out: Path) -> dict[str, Any]:
    """What the report and the folders say."""
    report = json.loads(child.stdout)
    chosen = json.loads((out / "conmoe.json").read_text(encoding="utf-8"))["plan"]["chosen"]
    names = ("precision", "rate", "prototypes", "pool_bytes", "slots", "reason")
    return {
        "plan": {name: chosen[name] for name in names},
        "source_bytes": sum(one.stat().st_size for one in model.glob("*.safetensors")),
        "package_bytes": sum(one.stat().st_size for one in out.glob("*.safetensors")),
        "kl": report["receipt"]["kl"],
        "parts": report["seconds"],
        "seconds": child.seconds,
        "cpu_seconds": child.cpu_seconds,
        "peak_rss": child.peak_rss,
        "peak_anonymous": child.peak_anonymous,
        "cgroup_peak": child.cgroup_peak,
        "limit": child.limit,
    }


def lines_of(facts: dict[str, Any], gpu: str, tokens: int) -> list[str]:
    """For a reader."""
    plan = facts["plan"]
    parts = sorted(facts["parts"].items(), key=lambda one: -one[1])
    cgroup = facts["cgroup_peak"]
    return [
        f"fit --gpu {gpu}, {tokens} calibration tokens",
        f"{plan['precision']}, {plan['rate']:.3%} removed, {plan['prototypes']} prototypes: {plan['reason']}",
        f"{human_size(facts['source_bytes'])} of weights became {human_size(facts['package_bytes'])}, "
        f"KL {facts['kl']:.6f}",
        f"{facts['seconds']:.0f} s, {facts['cpu_seconds']:.0f} s of processor: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts if seconds >= 1),
        f"most memory: resident {human_size(facts['peak_rss'])}, of no file {human_size(facts['peak_anonymous'])}"
        + ("" if cgroup is None else f", with page cache {human_size(cgroup)}")
        + ("" if facts["limit"] is None else f" of {human_size(facts['limit'])}"),
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="made by make_gpt_oss_shape.py")
    parser.add_argument("--out", type=Path, required=True, help="package to write; is replaced")
    parser.add_argument("--gpu", required=True, help="budget of fit")
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument("--limit", type=parse_size, help="hard memory limit, e.g. 24GiB")
    parser.add_argument("--name", help="file name of the results; gpt-oss-fit-BUDGET by default")
    parser.add_argument("fit_args", nargs="*", help="more flags for fit, after --")
    return parser.parse_args()


def main() -> None:
    """Run, count, print."""
    args = arguments()
    child = fit(args)
    if child.returncode:
        sys.exit(f"fit ended with exit code {child.returncode}\n{child.stdout}")
    facts = facts_of(child, args.model, args.out)
    here = machine()
    head = f"{here['cpu']}, {here['cores']} cores, {human_size(int(str(here['memory_bytes'])))}"
    lines = [head, *lines_of(facts, args.gpu, args.calibration_tokens)]
    name = args.name or f"gpt-oss-fit-{args.gpu.lower()}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = {"machine": here, "child": asdict(child) | {"stdout": "", "command": []}, **facts}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
