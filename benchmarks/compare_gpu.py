"""This project against transformers on a GPU that is too small: one run, one table, one cap for all arms.

    python -m benchmarks.compare_gpu --work DIR --cap 2GiB
    python -m benchmarks.compare_gpu --work DIR --layers 16 --cap 8GiB --repeats 5

Makes what it needs below ``--work``: a checkpoint of OLMoE-1B-7B's shape with so many layers and random weights, a
trace of routes, packages (``benchmarks/compare.py`` says more). Every arm is a process of its own, in which torch's
allocator may take the cap and no more; ours get the cap as their budget, accelerate's offload as much as lets it run.
Arms alternate over the repeats. The table has the median of the steps, and what was held on the card.

With ``--device cpu`` it runs without a GPU and without a cap: to see that it runs, not to measure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.arms import MODULES, SYSTEMS, ArmSettings, System
from benchmarks.comparison.artefacts import Workshop
from benchmarks.measure import machine
from conmoe_edge.units import parse_size

RESULTS = Path(__file__).resolve().parent / "results" / "compare_gpu.json"
GIB = 1 << 30
OFFLOAD_MARGIN = 1 << 30
"""Of a cap, what accelerate must leave free for the layer that it brings to the card."""


@dataclass(frozen=True, slots=True)
class GpuCell:
    """A system, under the cap or with the whole card; ``misses`` as of ``conmoe_edge.load``."""

    system: str
    capped: bool
    misses: str = "copy"

    @property
    def key(self) -> str:
        """Its name in files and in the table."""
        return f"{self.system}@{'cap' if self.capped else 'none'}" + (
            "" if self.misses == "copy" else f"+{self.misses}"
        )


CELLS = (
    GpuCell("transformers", capped=False),
    GpuCell("ours-bf16-0", capped=False),
    GpuCell("ours-int4-0", capped=False),
    GpuCell("offload", capped=True),
    GpuCell("ours-bf16-0", capped=True),
    GpuCell("ours-bf16-0", capped=True, misses="auto"),
    GpuCell("ours-bf16-50", capped=True),
    GpuCell("ours-int4-0", capped=True),
)


@dataclass(frozen=True, slots=True)
class GpuSettings(ArmSettings):
    """And where they run, within what."""

    device: str
    cap: int


def job_of(
    cell: GpuCell, system: System, shop: Workshop, settings: GpuSettings, prompt: Sequence[int]
) -> dict[str, Any]:
    """What the arm is told."""
    job = shop.job(system, settings, prompt) | {
        "device": settings.device,
        "device_bytes": settings.cap if cell.capped else None,
        "warm": True,
    }
    if system.engine == "ours":
        job["budget"] = f"{settings.cap // (1 << 20)}MiB" if cell.capped else "auto"
        job["misses"] = cell.misses
    elif system.engine == "offload":
        job["cpu_bytes"] = 1 << 40
        job["gpu_bytes"] = max(GIB // 2, settings.cap - OFFLOAD_MARGIN)
        job["offload_folder"] = str(shop.offload_folder())
    return job


def run_cell(
    cell: GpuCell, shop: Workshop, settings: GpuSettings, prompt: Sequence[int]
) -> dict[str, Any]:
    """One arm, once: its notes, and ``failed`` with the end of what it said where it did not come to its end."""
    system = SYSTEMS[cell.system]
    job_file = shop.work / "jobs" / f"gpu-{cell.key}.json"
    notes_file = job_file.with_suffix(".notes.json")
    notes_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job_of(cell, system, shop, settings, prompt)), encoding="utf-8")
    command = [sys.executable, "-m", MODULES[system.engine], str(job_file), str(notes_file)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=shop.environment(), check=False
    )
    notes: dict[str, Any] = {}
    if notes_file.exists():
        notes = json.loads(notes_file.read_text(encoding="utf-8"))
    if done.returncode or notes.get("stage") != "done":
        notes["failed"] = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return notes


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One line a cell, and how many times faster ours are than the peers under the same conditions."""
    lines = [
        f"{'cell':<24} {'tokens/s':>9} {'spread':>15} {'first s':>8} {'hit':>5} {'aside':>6} {'held GiB':>9}"
    ]
    speed: dict[str, float] = {}
    for key, runs in found.items():
        good = [one for one in runs if "failed" not in one]
        if not good:
            lines.append(f"{key:<24} {runs[-1]['failed'] if runs else 'not run'}")
            continue
        rates = sorted(1 / statistics.median(one["step_seconds"]) for one in good)
        speed[key] = statistics.median(rates)
        last = good[-1]
        hit = f"{last['hit']:.0%}" if "hit" in last else "-"
        aside = last.get("stats", {}).get("host_computed", 0)
        held = last.get("device_reserved")
        lines.append(
            f"{key:<24} {speed[key]:>9.2f} {f'{rates[0]:.2f}-{rates[-1]:.2f}':>15} "
            f"{statistics.median(one['first_token_seconds'] for one in good):>8.3f} {hit:>5} {aside:>6} "
            f"{'-' if held is None else f'{held / GIB:.2f}':>9}"
        )
    for peer, condition in (("transformers", "none"), ("offload", "cap")):
        base = speed.get(f"{peer}@{condition}")
        for key, rate in speed.items():
            if base and key.startswith("ours") and f"@{condition}" in key:
                lines.append(f"{key} over {peer}: {rate / base:.2f}")
    return lines


def make_model(folder: Path, layers: int) -> None:
    """The checkpoint, where it is not there yet."""
    if folder.exists():
        return
    words = ["--out", str(folder), "--layers", str(layers)]
    command = [sys.executable, "-m", "benchmarks.make_olmoe_shape", *words]
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for big files")
    parser.add_argument("--layers", type=int, default=4, help="of the checkpoint's 16 (4)")
    parser.add_argument("--cap", default="2GiB", help="of a card's memory (2GiB)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0, help="longest time for steps (30)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of the processor; 0: torch's own")
    parser.add_argument("--cells", nargs="+", choices=[cell.key for cell in CELLS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    cap = parse_size(args.cap)
    if cap is None:
        parser.error(f"{args.cap!r} is no size; 2GiB and 8GB are")
    import torch

    settings = GpuSettings(
        device=args.device,
        cap=cap,
        prompt_tokens=args.prompt_tokens,
        steps=args.steps,
        seconds=args.seconds,
        threads=args.threads or torch.get_num_threads(),
        context=args.prompt_tokens + args.steps + 32,
    )
    model = args.work / f"olmoe-{args.layers}"
    args.work.mkdir(parents=True, exist_ok=True)
    make_model(model, args.layers)
    shop = Workshop(model, args.work, sys.executable, settings.context)
    cells = [cell for cell in CELLS if args.cells is None or cell.key in args.cells]
    for cell in cells:
        shop.path_of(SYSTEMS[cell.system])
    prompt = shop.prompt(args.prompt_tokens + args.steps)
    found: dict[str, list[dict[str, Any]]] = {cell.key: [] for cell in cells}
    for repeat in range(args.repeats):
        for cell in cells if repeat % 2 == 0 else reversed(cells):
            found[cell.key].append(run_cell(cell, shop, settings, prompt))
            print(f"{cell.key}: {found[cell.key][-1].get('failed', 'done')}", file=sys.stderr)
    shop.clear_offload()
    lines = table(found)
    card = torch.cuda.get_device_name() if settings.device == "cuda" else "no card"
    value = {
        "machine": machine(),
        "card": card,
        "layers": args.layers,
        "cap": settings.cap,
        "table": lines,
        "runs": found,
    }
    args.out.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print("\n".join([card, *lines]))


if __name__ == "__main__":
    main()
