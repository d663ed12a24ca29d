"""This version beside another one: ``bench`` of the same packages, in turns.

    git worktree add ../before REVISION
    python -m benchmarks.against_version --before ../before --packages out-a out-b:4GB --turns 5

Each package is benched by both checkouts alternately, in a process of its own each time and with the same Python. The
table has the median of the turns and the ratio of the medians; ``spread`` is that of this version's turns. Run it on an
idle machine. A package may carry the budget that it is opened with, after a colon.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
PHASES = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens a second of one run of ``bench``, by phase, and the share of the prototypes that was resident."""

    speed: dict[str, float]
    resident: float
    kernel: str


def bench(checkout: Path, package: str, tokens: int, prompt: int, repeats: int) -> Turn:
    """One run of ``bench`` by the code of ``checkout``."""
    folder, _, budget = package.partition(":")
    command = [sys.executable, "-m", "conmoe_edge.cli.main", "bench", folder, "--device", "cpu"]
    command += ["--tokens", str(tokens), "--prompt-tokens", str(prompt), "--json"]
    command += ["--repeats", str(repeats), *(["--gpu", budget] if budget else [])]
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=checkout, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {checkout} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    speed = {name: found[name]["tokens_per_second"]["median"] for name in PHASES}
    package_facts = found["package"]
    share = package_facts["resident"] / max(1, package_facts["prototypes"])
    return Turn(speed, share, found["runtime"]["kernel"])


def rows(package: str, before: list[Turn], now: list[Turn]) -> list[str]:
    """A row for each phase of one package."""
    found = []
    for phase in PHASES:
        old = statistics.median(turn.speed[phase] for turn in before)
        values = sorted(turn.speed[phase] for turn in now)
        new = statistics.median(values)
        ratio, spread = new / old, f"{values[0]:.1f}-{values[-1]:.1f}"
        name = Path(package.partition(":")[0]).name
        share = f"{now[0].resident:.0%}"
        found.append(
            f"{name:<24} {share:>8} {phase:<8} {old:>9.1f} {new:>9.1f} {ratio:>6.3f}  {spread}"
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--before", type=Path, required=True, help="a checkout of the other version"
    )
    parser.add_argument("--packages", nargs="+", required=True, metavar="DIR[:BUDGET]")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2, help="rounds within a run")
    given = parser.parse_args()
    settings = (given.tokens, given.prompt, given.repeats)
    header = f"{'package':<24} {'resident':>8} {'phase':<8} {'before':>9} {'now':>9} {'ratio':>6}  spread"
    print(header, flush=True)
    for package in given.packages:
        before, now = [], []
        for turn in range(given.turns):
            arms = [(before, given.before.resolve()), (now, HERE)]
            for found, checkout in arms if turn % 2 == 0 else reversed(arms):
                found.append(bench(checkout, package, *settings))
        print("\n".join(rows(package, before, now)), flush=True)


if __name__ == "__main__":
    main()
