"""Few bits beside llama.cpp on the true shape of OLMoE-1B-7B, everything resident: tokens per second, in turns.

    python -m benchmarks.low_bits_speed --work /data/lowbits --llama-python /data/llama/bin/python
    python -m benchmarks.low_bits_speed --work /data/lowbits --llama-python /data/llama/bin/python --only q3:IQ3_S
    python -m benchmarks.low_bits_speed --report-only --work /data/lowbits

A match is one package of this project and one GGUF file of about its size. Both are written with random numbers
(``comparison/random_package.py``, ``comparison/random_gguf.py``), which takes as long as writing them: speed does not
depend on what the numbers are. The types in a GGUF file are those that llama.cpp's own quantiser gives each tensor. The
dense part of a package is in 4 bits (embeddings and head in 6). Routes are each model's own.

Turns alternate there and back over the repeats. Every turn is a process of its own, computes the prompt twice, and then
the steps; clock and steps are those of ``compare.py``. What is wanted is a ratio to the faster of llama.cpp's types at
that size. ``bound`` is the share of what the memory's bandwidth allows with the same bytes.

A match needs 4.3 to 8.2 GB of disk; its files are deleted where the next match does not need them. A finished turn is
not run again under the same ``--run``; results are written after every one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.arms import Cell, order
from benchmarks.comparison.report import make_row
from benchmarks.comparison.turns import (
    Ledger,
    Turn,
    environment,
    job_of,
    kernel_note,
    prepare_operator,
    run_turn,
    take_turns,
)
from benchmarks.make_olmoe_shape import Shape
from benchmarks.measure import machine
from conmoe_edge.checkpoint.fs.atomic_files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
GIB = 1 << 30
ROOM = 3 * GIB
"""What our budget has beside the package: everything is resident then."""


@dataclass(frozen=True, slots=True)
class Match:
    """Our precision, their type, and the ratio that is wanted; ``None`` for one that is run for interest."""

    ours: str
    theirs: str
    wanted: float | None

    @property
    def key(self) -> str:
        """In flags and files."""
        return f"{self.ours}:{self.theirs}"

    @property
    def sides(self) -> tuple[str, str]:
        """Keys of the two cells in the ledger."""
        return f"{self.ours}@{self.theirs}", f"{self.theirs}@{self.ours}"


MATCHES = (
    Match("q3", "IQ3_S", 1.3),
    Match("q3", "Q3_K_M", 1.3),
    Match("q2", "Q2_K", 1.5),
    Match("q2", "IQ2_S", 1.5),
    Match("q2", "IQ2_M", 1.5),
    Match("int4", "Q4_K_M", 1.25),
    Match("q4", "Q4_K_M", None),
)
"""IQ2_S stores experts in IQ2_XS, and IQ2_M in IQ2_S: llama.cpp's names are those of mixtures."""


class Files:
    """Makes what a match needs, and deletes what no later one does."""

    def __init__(self, work: Path, llama_python: str, shape: Shape) -> None:
        self._work, self.llama_python = work, llama_python
        self._config = work / "config.json"
        work.mkdir(parents=True, exist_ok=True)
        self._config.write_text(json.dumps(shape.config()), encoding="utf-8")

    def package(self, precision: str) -> Path:
        """A package, made if need be."""
        out = self._work / f"package-{precision}"
        if not (out / "conmoe.json").exists():
            words = ("--precision", precision, "--dense-precision", "q4")
            self._make(sys.executable, "random_package", out, words)
        return out

    def gguf(self, form: str) -> Path:
        """A GGUF file, made if need be."""
        out = self._work / f"{form.lower()}.gguf"
        if not out.exists():
            self._make(self.llama_python, "random_gguf", out, ("--form", form))
        return out

    def _make(self, python: str, module: str, out: Path, words: Sequence[str]) -> None:
        print(f"writing {out.name}", file=sys.stderr, flush=True)
        command = [python, "-m", f"benchmarks.comparison.{module}", "--config", str(self._config)]
        subprocess.run([*command, *words, "--out", str(out)], check=True, env=environment(2))

    def keep(self, later: Sequence[Match]) -> None:
        """Delete all files but those of ``later``."""
        names = {f"package-{one.ours}" for one in later}
        names |= {f"{one.theirs.lower()}.gguf" for one in later}
        for path in self._work.iterdir():
            if path.name not in names and path.suffix == ".gguf":
                path.unlink()
            elif path.name not in names and path.name.startswith("package-"):
                shutil.rmtree(path)


def turns_of(match: Match, files: Files, job: Mapping[str, Any]) -> tuple[Turn, Turn]:
    """Ours and theirs."""
    package, gguf = files.package(match.ours), files.gguf(match.theirs)
    shards = sorted(package.glob("*.safetensors"))
    room = sum(path.stat().st_size for path in shards) + ROOM
    own = {**job, "path": str(package), "budget": f"{room >> 20}MiB"}
    ours, theirs = match.sides
    return (
        Turn(ours, "ours", sys.executable, own, shards),
        Turn(theirs, "llama", files.llama_python, {**job, "path": str(gguf)}, [gguf]),
    )


def rates() -> dict[str, float]:
    """Bytes a second of this machine's memory, now."""
    from conmoe_edge.memory.bandwidth import memory_bandwidth

    return {"memory": memory_bandwidth(seconds=2.0) or 0.0}


def row_of(ledger: Ledger, key: str, cache_bytes: float) -> dict[str, Any] | None:
    """The figures of one side of a match; ``None`` where it was not run."""
    runs = ledger.runs_of(key)
    if not runs:
        return None
    memory = ledger.best_rate("memory") or 1.0
    row = make_row(Cell(key, None, ""), runs, memory, 1.0, cache_bytes)
    notes = [run["notes"] for run in runs if run["notes"].get("dense_token_bytes")]
    through = [one["dense_token_bytes"] + one["routed_token_bytes"] for one in notes]
    bound = None
    if through and row.speed:  # all is resident: what the disk is asked for is no part of it
        bound = (statistics.fmean(through) + cache_bytes) / memory * row.speed
    return {
        **asdict(row),
        "bound": bound,
        "token_bytes": statistics.fmean(through) if through else None,
        "note": kernel_note(notes),
        "all_resident": all(one.get("hit", 1.0) == 1.0 for one in notes),
    }


def results_of(ledger: Ledger, shape: Shape) -> dict[str, Any]:
    """Rows by match, ratios, and what is wanted."""
    settings = ledger.data["settings"]
    middle = settings["prompt_tokens"] + settings["steps"] / 2
    cache_bytes = shape.layers * 2 * shape.hidden * 2 * middle
    matches = []
    for match in MATCHES:
        ours, theirs = (row_of(ledger, key, cache_bytes) for key in match.sides)
        if ours is None or theirs is None:
            continue
        found: dict[str, Any] = {"match": match.key, "ours": ours, "theirs": theirs}
        found |= {"wanted": match.wanted, "ratio": None, "mean_ratio": None}
        if ours["speed"] and theirs["speed"]:
            found["ratio"] = ours["speed"] / theirs["speed"]
            found["mean_ratio"] = ours["mean"] / theirs["mean"]
            found["prompt_ratio"] = theirs["first"] / ours["first"]
        matches.append(found)
    return {
        "machine": machine(),
        "memory_bytes_per_second": ledger.best_rate("memory"),
        "settings": settings,
        "matches": matches,
    }


def lines_of(results: Mapping[str, Any]) -> list[str]:
    """For a reader."""
    here, settings = results["machine"], results["settings"]
    lines = [
        f"{here['cpu']}, {here['cores']} cores, {settings['threads']} threads, "
        f"memory {results['memory_bytes_per_second'] / 1e9:.1f} GB/s",
        f"OLMoE-1B-7B's shape with {settings['layers']} layers, random numbers, all resident; prompt of "
        f"{settings['prompt_tokens']} tokens, {settings['steps']} steps",
        "",
        f"{'':<10}{'tokens/s':>9}{'spread':>16}{'mean':>8}{'prompt s':>9}{'MB/token':>9}{'bound':>7}"
        f"{'ratio':>7}{'wanted':>8}",
    ]
    least: dict[str, tuple[float, float]] = {}
    for one in results["matches"]:
        for side, name in zip(("ours", "theirs"), one["match"].split(":"), strict=True):
            lines.append(_line(name, one[side], one if side == "ours" else None))
        if one["ratio"] is not None and one["wanted"] is not None:
            name = one["match"].split(":")[0]
            before = least.get(name, (one["ratio"], one["wanted"]))
            least[name] = min(before[0], one["ratio"]), one["wanted"]
        lines.append("")
    for name, (ratio, wanted) in least.items():
        word = "holds" if ratio >= wanted else "MISSED"
        lines.append(f"{name} over the faster of its peers: {ratio:.2f}, wanted {wanted}  {word}")
    return lines


def _line(name: str, row: Mapping[str, Any], match: Mapping[str, Any] | None) -> str:
    if row["speed"] is None:
        return f"{name:<10}{row['outcome']}"
    spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
    nbytes, bound = row["token_bytes"], row["bound"]
    line = (
        f"{name:<10}{row['speed']:>9.2f}{spread:>16}{row['mean']:>8.2f}{row['first']:>9.2f}"
        f"{'-' if nbytes is None else format(nbytes / 1e6, '.0f'):>9}"
        f"{'-' if bound is None else format(100 * bound, '.0f') + '%':>7}"
    )
    if match is not None and match["ratio"] is not None:
        line += f"{match['ratio']:>7.2f}{match['wanted'] or '-':>8}"
    line += row["note"]
    return line + ("" if row["all_resident"] else "  not all resident")


def report(ledger: Ledger, shape: Shape, name: str) -> list[str]:
    """JSON and text under ``benchmarks/results``; the text's lines are returned."""
    results = results_of(ledger, shape)
    lines = lines_of(results)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", results)
    (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="Disk: q3 matches 6.4 GB, q2 4.8 GB, int4 8.2 GB, q4 7.9 GB; one match at a time.",
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for files and the ledger")
    parser.add_argument("--llama-python", default="", help="interpreter with llama_cpp and gguf")
    parser.add_argument("--only", nargs="+", metavar="OURS:THEIRS", help="only these matches")
    parser.add_argument("--run", default="lowbits", help="id of this run; the same id goes on")
    parser.add_argument("--name", default="low-bits-speed", help="file name of the results")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="steps of each turn")
    parser.add_argument("--seconds-per-arm", type=float, default=60.0, help="decoding ends then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16, help="2 shows that it runs")
    parser.add_argument("--keep", action="store_true", help="do not delete files in between")
    parser.add_argument("--report-only", action="store_true", help="results of what was run so far")
    return parser.parse_args()


def main() -> None:
    """Match after match: make, take turns, report, delete."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends children too
    known = {match.key: match for match in MATCHES}
    if unknown := [key for key in args.only or () if key not in known]:
        sys.exit(f"no match is called {unknown[0]}; there are {', '.join(known)}")
    shape = Shape(layers=args.layers)
    settings = {
        "prompt_tokens": args.prompt_tokens,
        "steps": args.tokens,
        "seconds": args.seconds_per_arm,
        "threads": args.threads,
        "layers": args.layers,
    }
    args.work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.work / f"run-{args.run}.json", settings)
    if args.report_only:
        print("\n".join(report(ledger, shape, args.name)))
        return
    if not args.llama_python:
        sys.exit("--llama-python is needed to run")
    files = Files(args.work, args.llama_python, shape)
    prepare_operator()
    job = job_of(args) | {"warm": True}
    chosen = [known[key] for key in args.only] if args.only else list(MATCHES)
    for number, match in enumerate(chosen):
        cells = [Cell(side, None, "", needed=True) for side in match.sides]
        wanted = [
            (cell.system, repeat)
            for cell, repeat in order(cells, args.repeats, args.repeats)
            if not ledger.has(cell.system, repeat)
        ]
        if not wanted:
            continue
        if not args.keep:
            files.keep(chosen[number : number + 1])
        turns = dict(zip(match.sides, turns_of(match, files, job), strict=True))

        def run(side: str, repeat: int, turns: Mapping[str, Turn] = turns) -> dict[str, Any]:
            limit = 600 + 2 * args.seconds_per_arm
            return run_turn(turns[side], repeat, args.work / "jobs", args.threads, limit)

        take_turns(ledger, wanted, run, rates, lambda: report(ledger, shape, args.name))
    if not args.keep:
        files.keep([])
    print("\n".join(report(ledger, shape, args.name)))


if __name__ == "__main__":
    main()
