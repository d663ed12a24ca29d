"""This project against what users would pick instead: one run, one table, one memory cap for all.

    python -m benchmarks.compare --model /data/olmoe-shape --work /data/compare \\
        --llama-python /data/llama/bin/python
    python -m benchmarks.compare --shape qwen3-30b:15GB --work /data/compare --discard \\
        --llama-python /data/llama/bin/python

Every arm is a process of its own under the same cap (``comparison/capped.py``; page cache counts, no
swap), with its files dropped from the page cache before. All get the same prompt by token numbers
and are asked for the same number of greedy tokens, on the same number of threads. Arms alternate
over the repeats. What runs is the table in ``comparison/arms.py``; what an arm does is in
``comparison/*_arm.py``; how routing is made realistic for random weights is in
``comparison/traces.py``; what the bound is, in ``comparison/report.py``. README.md here says how to
set the environment up and what it takes.

With ``--shape`` the arms are those of ``comparison/large.py``: Qwen3-30B-A3B and gpt-oss-20b under caps of the memory
that people have, from files of random numbers.

The run can be stopped at any time: a finished (arm, cap, repeat) is not run again under the same
``--run``. Results are written after every arm.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison import large
from benchmarks.comparison.arms import (
    CELLS,
    GROUPS,
    SYSTEMS,
    ArmSettings,
    Cell,
    System,
    cap_name,
    order,
)
from benchmarks.comparison.artefacts import Workshop
from benchmarks.comparison.report import Row, claim_lines, claims, make_row, ratios, table
from benchmarks.comparison.turns import Ledger, Turn, prepare_operator, run_turn, take_turns
from benchmarks.measure import disk_read_rate, machine
from benchmarks.plots import compare_svg
from conmoe_edge.units import parse_size

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 1 << 20
OUR_MARGIN = 256 * MIB
"""Left of a cap beside our budget: pages of the cache that buffered reads of dense weights pass through."""
OFFLOAD_MARGIN = 2048 * MIB
"""Left of a cap beside accelerate's CPU share: the process, one layer's experts, activations."""
PROMPT_SECONDS = 600.0
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "i8mm", "sve")


@dataclass(frozen=True, slots=True)
class Settings(ArmSettings):
    """And how long an arm may load."""

    load_seconds: float


def job_of(
    cell: Cell, system: System, shop: Workshop, settings: Settings, prompt: Sequence[int]
) -> dict[str, Any]:
    """What the arm is told."""
    job = shop.job(system, settings, prompt) | {"warm": cell.cap is None}
    if system.engine == "ours":
        job["budget"] = "auto" if cell.cap is None else f"{(cell.cap - OUR_MARGIN) // MIB}MiB"
    elif system.engine == "llama":
        job["repack"] = system.repack
    elif system.engine == "offload":
        assert cell.cap is not None, "offloading without a cap would offload nothing"
        job["cpu_bytes"] = cell.cap - OFFLOAD_MARGIN
        job["offload_folder"] = str(shop.offload_folder())
    return job


def run_cell(
    cell: Cell, repeat: int, shop: Workshop, settings: Settings, prompt: Sequence[int]
) -> dict[str, Any]:
    """One arm, once."""
    system = SYSTEMS[cell.system]
    turn = Turn(
        key=cell.key,
        engine=system.engine,
        python=shop.python_of(system),
        job=job_of(cell, system, shop, settings, prompt),
        files=shop.weights(system),
        cap=cell.cap,
    )
    seconds = settings.load_seconds + PROMPT_SECONDS + settings.seconds
    entry = run_turn(turn, repeat, shop.work / "jobs", settings.threads, seconds)
    if system.engine == "offload":
        shop.clear_offload()
    return entry


def make_files(shop: Workshop, group: str, systems: Sequence[str]) -> set[str]:
    """Have everything that these systems need; those that it could not be made for are returned.

    They are left out of this run and tried again by the next one.
    """
    lacking = set()
    for name in systems:
        print(f"{group}: files of {name}", file=sys.stderr, flush=True)
        try:
            shop.path_of(SYSTEMS[name])
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
            lacking.add(name)
    return lacking


def measure_rates(shop: Workshop) -> dict[str, float]:
    """Bandwidths of this machine now, bytes a second."""
    from conmoe_edge.memory.bandwidth import memory_bandwidth

    largest = max(shop.model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    disk, _ = disk_read_rate(largest)
    return {"memory": memory_bandwidth(seconds=2.0) or 0.0, "disk": disk}


def describe_machine() -> dict[str, Any]:
    """CPU, its flags that matter here, memory, versions of Python and system."""
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.split(":", 1)[1].split())
                break
    except OSError:
        pass
    found = [flag for flag in FLAGS if flag in flags]
    return machine() | {"flags": found, "architecture": platform.machine()}


def rows_of(ledger: Ledger, cells: Sequence[Cell], cache_bytes: float) -> list[Row]:
    """A row for every cell that was run."""
    memory, disk = ledger.best_rate("memory"), ledger.best_rate("disk")
    return [
        make_row(cell, ledger.runs_of(cell.key), memory, disk, cache_bytes)
        for cell in cells
        if ledger.runs_of(cell.key)
    ]


def cache_bytes_of(model: Path, tokens: float) -> float:
    """Bytes of the key-value cache at ``tokens``, in 16 bits, which is what all of the engines keep."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    width = config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    return config["num_hidden_layers"] * 2 * width * 2 * tokens


def write_results(ledger: Ledger, shop: Workshop, settings: Settings, name: str) -> list[str]:
    """JSON, text and plot under ``benchmarks/results``; the text's lines are returned."""
    middle = settings.prompt_tokens + settings.steps / 2
    rows = rows_of(ledger, CELLS, cache_bytes_of(shop.model, middle))
    here = describe_machine()
    memory, disk = ledger.best_rate("memory"), ledger.best_rate("disk")
    checked = claims(rows)
    lines = [
        f"{here['cpu']}, {here['cores']} cores, {settings.threads} threads, "
        f"flags {' '.join(here['flags'])}",
        f"memory {memory / 1e9:.1f} GB/s, disk {disk / 1e9:.2f} GB/s",
        f"random weights in the shape of OLMoE-1B-7B; prompt of {settings.prompt_tokens} tokens, "
        f"{settings.steps} steps or {settings.seconds:.0f} s",
        "",
        *table(rows),
        "",
        *claim_lines(checked),
    ]
    runs = [{k: v for k, v in run.items() if k != "tail"} for run in ledger.data["runs"]]
    result = {
        "machine": here,
        "rates": ledger.data["rates"],
        "settings": ledger.data["settings"],
        "rows": [asdict(row) | {"cap": cap_name(row.cap)} for row in rows],
        "ratios": ratios(rows),
        "claims": checked,
        "runs": runs,
    }
    text = json.dumps(result, indent=1)
    for path in (shop.work, shop.model):
        text = text.replace(str(path.absolute()), path.name).replace(str(path), path.name)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.svg").write_text(compare_svg(result), encoding="utf-8")
    return lines


def discard(shop: Workshop, group: str, later: Sequence[Cell]) -> None:
    """Delete what this group's systems need and no later cell does."""
    keep = {cell.system for cell in later}
    forms = {SYSTEMS[key].form for key in keep if SYSTEMS[key].engine == "llama"}
    missing = any(not (shop.work / "gguf" / f"{form.lower()}.gguf").exists() for form in forms)
    for cell in CELLS:
        system = SYSTEMS[cell.system]
        shared = system.engine == "llama" and (
            system.form in forms or (system.form == "bf16" and missing)
        )
        if cell.group == group and system.key not in keep and not shared:
            shop.discard([system])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], epilog=large.disk_help()
    )
    parser.add_argument("--model", type=Path, help="made by make_olmoe_shape.py")
    parser.add_argument(
        "--shape", choices=sorted(large.LARGE), help="instead of --model: a large shape and its cap"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for big files")
    parser.add_argument("--llama-python", default="", help="interpreter with llama_cpp and gguf")
    parser.add_argument("--run", default="compare", help="id of this run; the same id goes on")
    parser.add_argument("--name", default="compare", help="file name of the results")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--cells", nargs="+", metavar="SYSTEM@CAP", help="only these")
    parser.add_argument("--needed", action="store_true", help="only the cells of the claims")
    parser.add_argument("--repeats", type=int, default=3, help="of the needed cells")
    parser.add_argument("--other-repeats", type=int, default=1, help="of all other cells")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens of each arm")
    parser.add_argument("--seconds-per-arm", type=float, default=90.0, help="decoding ends then")
    parser.add_argument("--load-seconds", type=float, default=900.0, help="longest loading")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--discard", action="store_true", help="delete a group's files after it")
    parser.add_argument("--make-only", action="store_true", help="make files, run nothing")
    parser.add_argument("--report-only", action="store_true", help="results of what was run so far")
    more = parser.add_argument_group("with --shape")
    more.add_argument("--turns", action="store_true", help="alternate; all files at once on disk")
    more.add_argument(
        "--written", default="", metavar="PRECISION:DENSE", help="write our package, do not fit it"
    )
    more.add_argument("--packages-from", type=Path, help="the --work of true_shapes.py --keep")
    more.add_argument("--prompt-seconds", type=float, default=1200.0, help="longest prompt")
    more.add_argument("--layers", type=int, help="a few show that it runs")
    more.add_argument("--experts", type=int, help="of every layer, likewise")
    more.add_argument("--slice-cap", type=parse_size, help="the cap of such a slice")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        parser.error("--model or --shape is needed")
    if args.model is not None and not args.llama_python and not args.report_only:
        parser.error("--llama-python is needed")
    return args


def main() -> None:
    """Group by group: make, run, report."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends children too
    if args.shape is not None:
        large.run(args)
        return
    settings = Settings(
        prompt_tokens=args.prompt_tokens,
        steps=args.tokens,
        seconds=args.seconds_per_arm,
        load_seconds=args.load_seconds,
        threads=args.threads,
        context=-(-(args.prompt_tokens + args.tokens + 1) // 256) * 256,
    )
    shop = Workshop(args.model, args.work, args.llama_python, settings.context)
    ledger = Ledger(args.work / f"run-{args.run}.json", asdict(settings))
    if args.report_only:
        print("\n".join(write_results(ledger, shop, settings, args.name)))
        return
    chosen = [
        cell
        for cell in CELLS
        if cell.group in args.groups
        and (cell.needed or not args.needed)
        and (not args.cells or cell.key in args.cells)
    ]
    groups = [group for group in GROUPS if any(cell.group == group for cell in chosen)]
    for number, group in enumerate(groups):
        cells = [cell for cell in chosen if cell.group == group]
        jobs = [
            (cell, repeat)
            for cell, repeat in order(cells, args.repeats, args.other_repeats)
            if not ledger.has(cell.key, repeat)
        ]
        lacking = make_files(shop, group, sorted({cell.system for cell, _ in jobs}))
        jobs = [(cell, repeat) for cell, repeat in jobs if cell.system not in lacking]
        if args.make_only:
            continue
        if jobs:
            prepare_operator()
            prompt = shop.prompt(settings.prompt_tokens + settings.steps)

            def run(cell: Cell, repeat: int, prompt: Sequence[int] = prompt) -> dict[str, Any]:
                return run_cell(cell, repeat, shop, settings, prompt)

            take_turns(
                *(ledger, jobs, run),
                rates=lambda: measure_rates(shop),
                report=lambda: write_results(ledger, shop, settings, args.name),
            )
        if args.discard:
            later = [cell for cell in chosen if cell.group in groups[number + 1 :]]
            discard(shop, group, later)
    if ledger.data["runs"]:
        print("\n".join(write_results(ledger, shop, settings, args.name)))


if __name__ == "__main__":
    main()
