"""``plan``, ``fit`` and ``bench`` at true size: what they take beside what they have to, and what was predicted.

    python -m benchmarks.true_shapes --work /data/true-shapes
    python -m benchmarks.true_shapes --work /data/true-shapes --only qwen3-30b:15GB gpt-oss-20b:8GB
    python -m benchmarks.true_shapes --work /data/true-shapes --only qwen3-30b/16:5GB qwen3-30b/32:10GB
    python -m benchmarks.true_shapes --work /data/true-shapes --layers 2 --experts 8 --only deepseek-16b:3GB
    python -m benchmarks.true_shapes --work /data/true-shapes --only qwen3-30b:15GB=q3:q4 gpt-oss-20b:8GB=q2:q4

Checkpoints are those of ``generated_checkpoint.py``: true shapes with random numbers, served by a hub in this process
and never on the disk. A cell is SHAPE[/LAYERS[xEXPERTS]]:BUDGET, and has three stages, each a process of its own:

* plan: seconds from headers alone, once the libraries are loaded;
* fit: for the budget, on a machine of 15 GB (``--fit-limit``: a hard limit; page cache counts, no swap): seconds by
  part beside the bounds of ``fit_bounds.py``, seconds for each layer, most memory, most disk;
* bench: tokens a second and memory under a hard limit of the budget, beside the plan's prediction, for routes of the
  model's own. Memory is what belongs to no file, and the pages of the libraries: what else is mapped is the kernel's
  to drop. The context is the bench's own in all stages (``--context``), so that what was planned is what is used.

A fit of 30 billion weights takes hours on two cores. For a cell that ends in =PRECISION:DENSE a package of the true
shape is written with random numbers in its records (``comparison/random_package.py``), every expert there, and the
stages are plan, write and bench: what was predicted for that package beside what was measured. ``--router-skew 0``
gives its routers rows of one length: all experts are asked for about as often, the worst case for a cache.

Few calibration tokens are enough, since weights are random. Finished stages are not run again under the same ``--run``,
and a fit that was stopped goes on where it was (its seconds are then only the last run's, and the table says so).
Results are written after every stage. The package is deleted after its bench unless ``--keep``.

Disk: one package and two layers of the source at a time, at most the budget and 3 GB; the server needs 300 MB of RAM.
A model that fits as it is comes over whole, into the hub's cache, and the package links to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.turns import Ledger, environment, prepare_operator
from benchmarks.fit_bounds import Rates, Sizes, measure_rates, parts_of, rate_lines
from benchmarks.fit_from_hub import command_of, fit, serving
from benchmarks.generated_checkpoint import SHAPES, SKEW, TrueShape, repository, total_bytes
from benchmarks.hub_server import Hub
from benchmarks.measure import forget, machine, run_child
from conmoe_edge.checkpoint.fs.atomic_files import write_json
from conmoe_edge.units import human_size, parse_size

RESULTS = Path(__file__).resolve().parent / "results"
BUDGETS = ("15GB", "12GB", "8GB")
CELLS = (
    *(
        f"{shape}:{budget}"
        for shape in ("qwen3-30b", "deepseek-16b", "gpt-oss-20b", "olmoe-7b")
        for budget in BUDGETS
    ),
    "qwen3-30b/16:5GB",
    "qwen3-30b/32:10GB",
)
"""The last two stand beside qwen3-30b:15GB: a third and two thirds of its depth and bytes."""
STAGES = ("plan", "fit", "bench")
WRITTEN_STAGES = ("plan", "write", "bench")
_CELL = re.compile(r"([a-z0-9-]+)(?:/(\d+)(?:x(\d+))?)?:(\w[\w.]*)(?:=([\w-]+:\w+))?")
_RATE_BYTES = 512 << 20
_PLAN = """
import json, sys, time
import conmoe_edge
start = time.perf_counter()
conmoe_edge.plan("demo", budget="2GB", device="cpu")
middle = time.perf_counter()
levers = json.loads(sys.argv[3])
report = conmoe_edge.plan(sys.argv[1], budget=sys.argv[2], device="cpu", **levers).to_json()
seconds = time.perf_counter() - middle
plan = {key: one for key, one in report["plan"].items() if key != "candidates"}
print(json.dumps({"seconds": seconds, "libraries_seconds": middle - start, "plan": plan}))
"""
_LIBRARIES = """
import conmoe_edge, torch, transformers
from transformers import AutoModelForCausalLM
from conmoe_edge.offload.kernels.cpu.bindings import operator
operator()
torch.randn(64, 64) @ torch.randn(64, 64)
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:")))
"""
_FETCH = """
import sys, time, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Range": f"bytes=0-{int(sys.argv[2]) - 1}"})
start = time.perf_counter()
with urllib.request.urlopen(request) as answer:
    count = 0
    while piece := answer.read(1 << 20):
        count += len(piece)
print(count / (time.perf_counter() - start))
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """A shape, perhaps with another depth or number of experts, and a budget.

    ``written``: PRECISION:DENSE of a package that is written; empty where one is fitted.
    """

    shape: str
    budget: str
    layers: int | None = None
    experts: int | None = None
    written: str = ""

    @classmethod
    def of(cls, text: str, layers: int | None = None, experts: int | None = None) -> Cell:
        """From SHAPE[/LAYERS[xEXPERTS]]:BUDGET[=PRECISION:DENSE]; ``layers`` and ``experts`` where it names none.

        Raises:
            ValueError: it is none, or names no shape.
        """
        found = _CELL.fullmatch(text)
        if found is None or found[1] not in SHAPES:
            raise ValueError(f"{text} is no SHAPE[/LAYERS[xEXPERTS]]:BUDGET of {', '.join(SHAPES)}")
        own = (int(one) if one else None for one in (found[2], found[3]))
        depth, count = (one or other for one, other in zip(own, (layers, experts), strict=True))
        return cls(found[1], found[4], depth, count, found[5] or "")

    @property
    def key(self) -> str:
        """In the ledger and in tables."""
        size = "" if self.layers is None else f"/{self.layers}"
        if self.experts is not None:
            size = f"{size or '/-'}x{self.experts}"
        written = f"={self.written}" if self.written else ""
        return f"{self.shape}{size}:{self.budget}{written}"

    @property
    def slug(self) -> str:
        """As the name of a folder."""
        return re.sub(r"[^a-zA-Z0-9.]+", "-", self.key)

    def checkpoint(self) -> TrueShape:
        """What is served."""
        shape: Any = SHAPES[self.shape]
        if self.layers is not None:
            shape = dataclasses.replace(shape, layers=self.layers)
        if self.experts is not None:
            top = min(shape.top_k, self.experts)
            shape = dataclasses.replace(shape, experts=self.experts, top_k=top)
        return shape


def fetch_rate(hub_url: str) -> float:
    """Bytes a second that another process gets from the hub."""
    child = run_child([sys.executable, "-c", _FETCH, hub_url, str(_RATE_BYTES)])
    if child.returncode:
        raise RuntimeError("the rate of the hub could not be measured")
    return float(child.stdout)


def library_bytes() -> int:
    """Resident pages of the libraries' files."""
    child = run_child([sys.executable, "-c", _LIBRARIES])
    if child.returncode:
        raise RuntimeError("the pages of the libraries could not be counted")
    return int(child.stdout)


class Bench:
    """The stages of one cell.

    Args:
        work: folder for the package and small files.
        settings: ``calibration_tokens``, ``prompt_tokens``, ``tokens``, ``context``, ``router_skew``, ``fit_limit``
            (bytes; ``None``: nothing is limited), ``words``.
    """

    def __init__(self, cell: Cell, work: Path, settings: Mapping[str, Any]) -> None:
        self.cell, self.settings = cell, settings
        self.folder = work / cell.slug
        self.out = self.folder / "fit" / "out"
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.shape = cell.checkpoint()
        self.name = f"generated/{cell.slug}"
        self.files = repository(self.shape)
        limited = settings["fit_limit"] is not None
        self.limit = parse_size(cell.budget) if limited else None

    def plan(self) -> dict[str, Any]:
        """Seconds, and what was planned."""
        levers: dict[str, Any] = {"context": self.settings["context"]}
        if self.cell.written:  # what such a package is expected to take
            precision, _, dense = self.cell.written.partition(":")
            levers |= {"method": "conmoe", "rate": 0, "kv_precision": "source"}
            levers |= {"precision": precision, "dense_precision": dense}
        words = [self.name, self.cell.budget, json.dumps(levers)]
        child = run_child([sys.executable, "-c", _PLAN, *words])
        if child.returncode:
            raise SystemExit(f"plan ended with {child.returncode}")
        return json.loads(child.stdout) | {"process_seconds": child.seconds}

    def fit(self, hub: Hub, url: str) -> dict[str, Any]:
        """Seconds by part beside bounds, memory, disk, bytes."""
        config = self.shape.config()
        sizes = Sizes.of(config, total_bytes(self.files))
        resumed = any(self.out.parent.glob(".out.partial*"))
        fetched_rate = fetch_rate(url)
        before, raw = measure_rates(None, self.folder, sizes, scope=1)
        words = ["--calibration-tokens", str(self.settings["calibration_tokens"]), "--overwrite"]
        words += ["--context", str(self.settings["context"])]
        words += self.settings["words"]
        command = command_of(self.name, self.cell.budget, self.out, words)
        done = fit(hub, command, self.folder, self.out, self.settings["fit_limit"])
        after, _ = measure_rates(None, self.folder, sizes, scope=1)
        rates = before.better(after)
        tokens = self.settings["calibration_tokens"]
        parts = parts_of(sizes, rates, done.report, self.out, tokens, fetched_rate)
        manifest = json.loads((self.out / "conmoe.json").read_text(encoding="utf-8"))
        shards = sorted(self.out.glob("*.safetensors"))
        plan = {key: one for key, one in manifest["plan"].items() if key != "candidates"}
        facts = done.facts(total_bytes(self.files))
        return facts | {
            "resumed": resumed,
            "layers": sizes.layers,
            "weights_bytes": sum(path.stat().st_size for path in shards),
            "plan": plan,
            "parts": [asdict(part) for part in parts],
            "bound_seconds": sum(part.bound or 0.0 for part in parts),
            "rates": asdict(rates) | {"hub": fetched_rate},
            "torch": raw["torch"],
        }

    def write(self) -> dict[str, Any]:
        """A package with random numbers in its records; bytes."""
        config = self.folder / "config.json"
        config.write_text(json.dumps(self.shape.config()), encoding="utf-8")
        precision, _, dense = self.cell.written.partition(":")
        command = [sys.executable, "-m", "benchmarks.comparison.random_package"]
        command += ["--config", str(config), "--out", str(self.out)]
        command += ["--precision", precision, "--dense-precision", dense or "source"]
        command += ["--router-skew", str(self.settings["router_skew"])]
        subprocess.run(command, check=True, env=environment(2))
        written = sum(path.stat().st_size for path in self.out.glob("*.safetensors"))
        return {"package_bytes": written}

    def bench(self) -> dict[str, Any]:
        """What ``bench`` says, and the most memory."""
        forget(sorted(self.out.glob("*.safetensors")))
        command = [sys.executable, "-m", "conmoe_edge", "bench", str(self.out), "--device", "cpu"]
        command += ["--gpu", self.cell.budget, "--repeats", "1", "--json"]
        command += ["--prompt-tokens", str(self.settings["prompt_tokens"])]
        command += ["--tokens", str(self.settings["tokens"])]
        command += ["--context", str(self.settings["context"])]
        child = run_child(command, self.limit)
        if child.returncode:
            raise SystemExit(f"bench ended with {child.returncode}\n{child.stdout}")
        return {
            "report": json.loads(child.stdout),
            "peak_rss_bytes": child.peak_rss,
            "peak_anonymous_bytes": child.peak_anonymous,
            "library_bytes": library_bytes(),
            "cgroup_peak_bytes": child.cgroup_peak,
            "seconds": child.seconds,
        }

    def clear(self) -> None:
        """Delete everything of the cell."""
        shutil.rmtree(self.folder, ignore_errors=True)


def run_cell(bench: Bench, ledger: Ledger, stages: Sequence[str]) -> None:
    """The stages that are not in the ledger; a stage that fails is noted, and those behind it are left out."""
    key = bench.cell.key
    with serving(bench.name, bench.files, bench.folder) as hub:
        for stage in stages:
            if ledger.has(f"{key} {stage}", 0):
                if ledger.runs_of(f"{key} {stage}")[-1]["outcome"] != "ok":
                    return
                continue
            print(f"{key}: {stage}", file=sys.stderr, flush=True)
            found: dict[str, Any] = {}
            outcome = "ok"
            try:
                if stage == "plan":
                    found = bench.plan()
                elif stage == "fit":
                    found = bench.fit(hub, _largest_url(bench))
                elif stage == "write":
                    found = bench.write()
                else:
                    found = bench.bench()
            except SystemExit as error:
                if not isinstance(error.code, str):  # the user's, not a stage's
                    raise
                outcome = error.code
            ledger.add("runs", {"cell": f"{key} {stage}", "repeat": 0, "outcome": outcome, **found})
            if outcome != "ok":
                print(f"{key}: {outcome}", file=sys.stderr, flush=True)
                return


def _largest_url(bench: Bench) -> str:
    import os

    name = max(bench.files, key=lambda one: bench.files[one].size)
    return f"{os.environ['HF_ENDPOINT']}/{bench.name}/resolve/main/{name}"


def facts_of(ledger: Ledger, key: str) -> dict[str, dict[str, Any]]:
    """Stage -> its entry, of those that were run."""
    stages = dict.fromkeys((*STAGES, *WRITTEN_STAGES))
    return {stage: runs[-1] for stage in stages if (runs := ledger.runs_of(f"{key} {stage}"))}


def summary(key: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one cell side by side; those that were not measured are missing."""
    row: dict[str, Any] = {"cell": key}
    for stage, entry in found.items():
        if entry["outcome"] != "ok":
            row["outcome"] = f"{stage}: {entry['outcome'].splitlines()[0][:100]}"
    if "seconds" in (plan := found.get("plan", {})):
        row["plan_seconds"] = plan["seconds"]
    if "parts" in (done := found.get("fit", {})):
        chosen = done["plan"]["chosen"]
        row |= {
            "precision": chosen["precision"],
            "bits": chosen.get("bits"),
            "resident_share": chosen["resident_share"],
            "fit_seconds": done["seconds"],
            "bound_seconds": done["bound_seconds"],
            "seconds_a_layer": done["seconds"] / done["layers"],
            "resumed": done["resumed"],
            "fit_peak_bytes": done["peak_anonymous_bytes"],
            "most_disk_bytes": done["most_disk_bytes"],
            "package_bytes": done["package_bytes"],
            "planned_memory": done["plan"]["device_bytes_used"],
            "planned_disk": done["plan"]["disk_bytes"],
        }
    if "report" in (ran := found.get("bench", {})):
        report = ran["report"]
        decode = report["decode"]
        row |= {
            "speed": decode["tokens_per_second"]["median"],
            "prompt_speed": report["prefill"]["tokens_per_second"]["median"],
            "planned_speed": report["expected"]["planned_tokens_per_second"],
            "expected_speed": report["expected"]["tokens_per_second"],
            "speed_ratio": report["expected"]["measured_ratio"],
            "expected_with_reads": report["expected"].get("tokens_per_second_with_these_reads"),
            "hit": decode["hit_rate"],
            "kernel": report["runtime"]["kernel"],
            "share_of_bound": (decode["bound"] or {}).get("share_of_serial"),
            "used_memory": report["memory"]["used_bytes"],
            "peak_memory": ran["peak_anonymous_bytes"] + ran["library_bytes"],
        }
        if row["expected_with_reads"]:
            row["reads_ratio"] = row["speed"] / row["expected_with_reads"]
        if "write" in found:
            row["planned_memory"] = plan["plan"]["device_bytes_used"]
        if "planned_memory" in row:
            row["memory_difference"] = row["peak_memory"] - row["planned_memory"]
    return row


def lines_of(rows: Sequence[Mapping[str, Any]], ledger: Ledger) -> list[str]:
    """For a reader: two tables, and the parts of every fit."""
    here, settings = machine(), ledger.data["settings"]
    lines = [
        f"{here['cpu']}, {here['cores']} cores; {settings['calibration_tokens']} calibration tokens, prompt of "
        f"{settings['prompt_tokens']} tokens and {settings['tokens']} more, "
        + ("" if settings["router_skew"] == SKEW else f"router skew {settings['router_skew']:g}, ")
        + (
            "no limit"
            if settings["fit_limit"] is None
            else f"fit under a hard limit of {human_size(settings['fit_limit'])}, bench under one of the budget"
        ),
        "",
        f"{'cell':<28}{'plan s':>7}{'bits':>7}{'resident':>9}{'fit s':>8}{'bound':>8}{'ratio':>7}{'s/layer':>8}"
        f"{'memory GB':>10}{'disk GB':>9}{'package GB':>11}{'planned':>9}",
    ]
    lines += [_fit_line(row) for row in rows]
    lines += [
        "",
        f"{'cell':<28}{'tokens/s':>9}{'planned':>9}{'expected':>9}{'by hits':>9}{'ratio':>7}{'prompt t/s':>11}"
        f"{'hit':>6}{'bound':>7}{'peak GB':>9}{'planned':>9}{'differs':>9}",
    ]
    lines += [_bench_line(row) for row in rows if "speed" in row]
    for row in rows:
        done = facts_of(ledger, str(row["cell"])).get("fit", {})
        if "parts" in done:
            lines += ["", *_part_lines(str(row["cell"]), done)]
    return lines


def _fit_line(row: Mapping[str, Any]) -> str:
    line = f"{row['cell']:<28}{_number(row.get('plan_seconds'), 7, 2)}"
    if "fit_seconds" in row:
        line += (
            f"{_number(row['bits'], 7, 2) if row['bits'] else format(row['precision'], '>7')}"
            f"{_percent(row['resident_share'], 9)}{_number(row['fit_seconds'], 8, 0)}"
            f"{_number(row['bound_seconds'], 8, 0)}{_number(row['fit_seconds'] / row['bound_seconds'], 7, 2)}"
            f"{_number(row['seconds_a_layer'], 8, 1)}{_number(row['fit_peak_bytes'] / 1e9, 10, 2)}"
            f"{_number(row['most_disk_bytes'] / 1e9, 9, 2)}{_number(row['package_bytes'] / 1e9, 11, 2)}"
            f"{_number(row['planned_disk'] / 1e9, 9, 2)}"
        )
        if row["resumed"]:
            line += "  went on; seconds are of the last run"
    return line + (f"  {row['outcome']}" if "outcome" in row else "")


def _bench_line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['cell']:<28}{_number(row['speed'], 9, 2)}{_number(row.get('planned_speed'), 9, 2)}"
        f"{_number(row['expected_speed'], 9, 2)}{_number(row['expected_with_reads'], 9, 2)}"
        f"{_number(row.get('reads_ratio', row['speed_ratio']), 7, 2)}"
        f"{_number(row['prompt_speed'], 11, 1)}{_percent(row['hit'], 6)}{_percent(row['share_of_bound'], 7)}"
        f"{row['peak_memory'] / 1e9:>9.2f}{row.get('planned_memory', math.nan) / 1e9:>9.2f}"
        f"{row.get('memory_difference', math.nan) / (1 << 20):>+5.0f} MiB"
        + ("" if row["kernel"].startswith("native") else f"  kernel: {row['kernel']}")
    )


def _part_lines(key: str, done: Mapping[str, Any]) -> list[str]:
    raw = dict(done["rates"])
    hub = raw.pop("hub")
    rates = rate_lines(Rates(**raw))
    lines = [f"{key}, hub {hub / 1e9:.2f} GB/s, {rates[0]}", f"  {rates[1]}"]
    for part in done["parts"]:
        bound = part["bound"]
        ratio = "" if not bound else f"{part['seconds'] / bound:>8.2f}  {part['work']}"
        shown = "" if bound is None else f"{bound:.1f}"
        lines.append(f"  {part['name']:<16}{part['seconds']:>9.1f}{shown:>10}{ratio}")
    limit = done["limit_bytes"]
    lines.append(
        f"  peak resident {human_size(done['peak_rss_bytes'])}, of no file "
        f"{human_size(done['peak_anonymous_bytes'])}"
        + ("" if limit is None else f", limit {human_size(limit)}")
    )
    return lines


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def _percent(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(100 * value, '.0f') + '%':>{width}}"


def report(ledger: Ledger, keys: Sequence[str], name: str) -> list[str]:
    """JSON and text under ``benchmarks/results``; the text's lines are returned."""
    rows = [summary(key, found) for key in keys if (found := facts_of(ledger, key))]
    lines = lines_of(rows, ledger)
    RESULTS.mkdir(exist_ok=True)
    data = {"machine": machine(), "rows": rows, **ledger.data}
    text = json.dumps(data).replace(str(ledger.path.parent.absolute()), "work")
    write_json(RESULTS / f"{name}.json", json.loads(text))
    (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog=f"Cells by default: {' '.join(CELLS)}. Shapes: {', '.join(SHAPES)}. "
        "Disk: the budget and 3 GB, one cell at a time.",
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for files and the ledger")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="CELL",
        help="SHAPE[/LAYERS[xEXPERTS]]:BUDGET[=PRECISION:DENSE]",
    )
    stages = sorted({*STAGES, *WRITTEN_STAGES})
    parser.add_argument("--stages", nargs="+", choices=stages, help="all by default")
    parser.add_argument("--layers", type=int, help="of every shape; 2 shows that it runs")
    parser.add_argument("--experts", type=int, help="of every layer")
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--context", type=int, help="tokens to keep room for; those of the bench by default"
    )
    parser.add_argument(
        "--router-skew", type=float, default=SKEW, help="of written packages; 0: rows alike"
    )
    parser.add_argument(
        "--fit-limit", type=parse_size, default=parse_size("15GB"), help="memory of fit (15GB)"
    )
    parser.add_argument("--no-limit", action="store_true", help="no hard limits of memory")
    parser.add_argument("--run", default="shapes", help="id of this run; the same id goes on")
    parser.add_argument("--name", default="true-shapes", help="file name of the results")
    parser.add_argument("--keep", action="store_true", help="keep packages")
    parser.add_argument("--report-only", action="store_true", help="results of what was run so far")
    parser.add_argument("words", nargs="*", metavar="-- FLAGS OF FIT")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Cell after cell."""
    args = arguments(words)
    try:
        cells = [Cell.of(one, args.layers, args.experts) for one in args.only or CELLS]
    except ValueError as error:
        sys.exit(str(error))
    settings = {
        "calibration_tokens": args.calibration_tokens,
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "context": args.context or args.prompt_tokens + args.tokens,
        "router_skew": args.router_skew,
        "fit_limit": None if args.no_limit else args.fit_limit,
        "words": list(args.words),
    }
    args.work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.work / f"run-{args.run}.json", settings)
    known = [run["cell"].rsplit(" ", 1)[0] for run in ledger.data["runs"]]
    keys = list(dict.fromkeys([*known, *(cell.key for cell in cells)]))
    if not args.report_only:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        prepare_operator()
        for cell in cells:
            own = WRITTEN_STAGES if cell.written else STAGES
            stages = [one for one in own if not args.stages or one in args.stages]
            if all(ledger.has(f"{cell.key} {stage}", 0) for stage in stages):
                continue
            bench = Bench(cell, args.work, settings)
            run_cell(bench, ledger, stages)
            report(ledger, keys, args.name)
            done = ledger.has(f"{cell.key} bench", 0)
            if done and not args.keep:
                bench.clear()
    print("\n".join(report(ledger, keys, args.name)))


if __name__ == "__main__":
    main()
