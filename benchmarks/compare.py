"""This project against what users would pick instead: one run, one table, one memory cap for all.

    python -m benchmarks.compare --model /data/olmoe-shape --work /data/compare \\
        --llama-python /data/llama/bin/python

Every arm is a process of its own under the same cap (``comparison/capped.py``; page cache counts, no
swap), with its files dropped from the page cache before. All get the same prompt by token numbers
and are asked for the same number of greedy tokens, on the same number of threads. Arms alternate
over the repeats. What runs is the table in ``comparison/arms.py``; what an arm does is in
``comparison/*_arm.py``; how routing is made realistic for random weights is in
``comparison/traces.py``; what the bound is, in ``comparison/report.py``. README.md here says how to
set the environment up and what it takes.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.comparison.arms import (
    CELLS,
    GROUPS,
    MODULES,
    SYSTEMS,
    ArmSettings,
    Cell,
    System,
    cap_name,
    order,
)
from benchmarks.comparison.artefacts import Workshop
from benchmarks.comparison.capped import Capped, run_capped, says_out_of_memory
from benchmarks.comparison.plot import plot
from benchmarks.comparison.report import Row, claim_lines, claims, make_row, ratios, table
from benchmarks.measure import disk_read_rate, forget, machine

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


class Ledger:
    """The runs of one run id, on disk after every one."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self.data: dict[str, Any] = {"settings": asdict(settings), "rates": [], "runs": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            if self.data["settings"] != asdict(settings):
                sys.exit(f"{path} was begun with other settings; take another --run")

    def has(self, cell: Cell, repeat: int) -> bool:
        """Whether this was run already."""
        return any(r["cell"] == cell.key and r["repeat"] == repeat for r in self.data["runs"])

    def add(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Append and save."""
        self.data[kind].append(entry)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        part.replace(self._path)

    def runs_of(self, cell: Cell) -> list[dict[str, Any]]:
        """The repeats of a cell."""
        return [run for run in self.data["runs"] if run["cell"] == cell.key]

    def best_rate(self, name: str) -> float:
        """The better of what was measured before and after: the harder bound."""
        return max(rates[name] for rates in self.data["rates"])


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
    job_file = shop.work / "jobs" / f"{cell.key}.json"
    notes_file = shop.work / "jobs" / f"{cell.key}.notes.json"
    notes_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job_of(cell, system, shop, settings, prompt)), encoding="utf-8")
    forget(shop.weights(system))
    command = [shop.python_of(system), "-m", MODULES[system.engine], str(job_file), str(notes_file)]
    environment = shop.environment() | {"OMP_NUM_THREADS": str(settings.threads)}
    seconds = settings.load_seconds + PROMPT_SECONDS + settings.seconds
    done = run_capped(command, cell.cap, seconds, environment)
    if system.engine == "offload":
        shop.clear_offload()
    notes = json.loads(notes_file.read_text(encoding="utf-8")) if notes_file.exists() else {}
    peaks = [peak for peak in (done.peak, notes.get("cgroup_peak")) if peak is not None]
    return {
        "cell": cell.key,
        "repeat": repeat,
        "outcome": outcome_of(done, notes),
        "returncode": done.returncode,
        "seconds": round(done.seconds, 1),
        "peak": max(peaks, default=None),
        "capped_by": done.how,
        "notes": notes,
        "tail": "" if done.returncode == 0 else done.tail,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def outcome_of(done: Capped, notes: Mapping[str, Any]) -> str:
    """One phrase; ``ok`` only for an arm that came to its end."""
    stage = notes.get("stage", "start")
    if done.returncode == 0 and stage == "done":
        return "ok"
    if done.out_of_memory or says_out_of_memory(done.tail):
        return f"out of memory ({stage})"
    if done.timed_out:
        return f"no end within {done.seconds:.0f} s ({stage})"
    last = done.tail.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return f"failed ({stage}): {last[0][:120]}"


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
        make_row(cell, ledger.runs_of(cell), memory, disk, cache_bytes)
        for cell in cells
        if ledger.runs_of(cell)
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
    title = f"OLMoE-1B-7B shape on {here['cores']} CPU cores"
    (RESULTS / f"{name}.svg").write_text(plot(rows, title), encoding="utf-8")
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="made by make_olmoe_shape.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for big files")
    parser.add_argument("--llama-python", required=True, help="interpreter with llama_cpp and gguf")
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
    return parser.parse_args()


def main() -> None:
    """Group by group: make, run, report."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends children too
    settings = Settings(
        prompt_tokens=args.prompt_tokens,
        steps=args.tokens,
        seconds=args.seconds_per_arm,
        load_seconds=args.load_seconds,
        threads=args.threads,
        context=-(-(args.prompt_tokens + args.tokens + 1) // 256) * 256,
    )
    shop = Workshop(args.model, args.work, args.llama_python, settings.context)
    ledger = Ledger(args.work / f"run-{args.run}.json", settings)
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
            if not ledger.has(cell, repeat)
        ]
        lacking = make_files(shop, group, sorted({cell.system for cell, _ in jobs}))
        jobs = [(cell, repeat) for cell, repeat in jobs if cell.system not in lacking]
        if args.make_only:
            continue
        if jobs:
            prompt = shop.prompt(settings.prompt_tokens + settings.steps)
            ledger.add("rates", measure_rates(shop))
        for cell, repeat in jobs:
            entry = run_cell(cell, repeat, shop, settings, prompt)
            ledger.add("runs", entry)
            notes = entry["notes"].get("step_seconds") or []
            speed = f", {len(notes) / sum(notes):.2f} tokens/s" if notes else ""
            print(f"{cell.key} {repeat}: {entry['outcome']}{speed}", file=sys.stderr, flush=True)
            write_results(ledger, shop, settings, args.name)
        if jobs:
            ledger.add("rates", measure_rates(shop))
        if args.discard:
            later = [cell for cell in chosen if cell.group in groups[number + 1 :]]
            discard(shop, group, later)
    if ledger.data["runs"]:
        print("\n".join(write_results(ledger, shop, settings, args.name)))


if __name__ == "__main__":
    main()
