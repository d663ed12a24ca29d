"""The arms of ``compare.py`` at 20 and 30 billion weights: who is compared with whom under which cap.

A cell is a shape under a cap. Files of true shape do not all fit a disk at once, so a system's files are made, all its
repeats run, and its files deleted, one system after the other; with ``--turns`` all of a cell's files are made first
and repeats alternate. Nothing needs a checkpoint: the GGUF files are written with random blocks
(``random_gguf.py``), and our package comes out of a real ``fit`` from the hub of ``generated_checkpoint.py``, or is one
that ``true_shapes.py --keep`` left, or (``--written q3:q4``) is written with random numbers like theirs.

Routes are each model's own; routers are the same on both sides, and ask for some experts oftener than for others.
Both are fed the text's tokens: an answer that goes round in a circle would find all its experts in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from benchmarks.fit_from_hub import command_of, fit, serving
from benchmarks.generated_checkpoint import SHAPES, repository
from benchmarks.measure import disk_read_rate, machine
from conmoe_edge.checkpoint.fs.atomic_files import write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
MIB, GB = 1 << 20, 10**9
MARGIN = 256 * MIB
"""Left of a cap beside our budget: pages of the cache that buffered reads of dense weights pass through."""
CALIBRATION_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Arm:
    """What somebody could run under a cap.

    Attributes:
        form: of the GGUF file; empty for ours.
        experts: of every layer of that file, where it has fewer than the model.
        repack: whether llama.cpp may copy weights into the layout of its kernels.
        disk: GB of its files.
        wanted: how many times as fast ours is to be; ``None`` where it is only shown.
    """

    key: str
    label: str
    disk: float
    form: str = ""
    experts: int | None = None
    repack: bool = False
    wanted: float | None = None


@dataclass(frozen=True, slots=True)
class LargeCell:
    """A shape under a cap in bytes; ``least``: tokens a second that ours is to make."""

    shape: str
    cap: int
    arms: tuple[Arm, ...]
    least: float | None = None

    @property
    def key(self) -> str:
        """As for ``--shape``."""
        return f"{self.shape}:{self.cap // GB}GB"


def _ours(disk: float) -> Arm:
    return Arm("ours", "conmoe-edge", disk)


LARGE: dict[str, LargeCell] = {
    cell.key: cell
    for cell in (
        LargeCell(
            "qwen3-30b",
            15 * GB,
            (
                _ours(14.0),
                Arm("q4-k-m", "llama.cpp Q4_K_M, mapped", 18.6, "Q4_K_M", wanted=2.0),
                Arm("iq3-s", "llama.cpp IQ3_S", 13.3, "IQ3_S", wanted=1.2),
                Arm("q3-k-s", "llama.cpp Q3_K_S", 13.3, "Q3_K_S", wanted=1.2),
            ),
            least=8.0,
        ),
        LargeCell("qwen3-30b", 12 * GB, (_ours(13.0),)),
        LargeCell(
            "qwen3-30b",
            8 * GB,
            (
                _ours(9.0),
                Arm("q4-k-m", "llama.cpp Q4_K_M, mapped", 18.6, "Q4_K_M", wanted=3.0),
                Arm("iq1-m", "llama.cpp IQ1_M", 7.1, "IQ1_M"),
                Arm("iq2-xxs", "llama.cpp IQ2_XXS, mapped", 8.2, "IQ2_XXS"),
            ),
            least=2.0,
        ),
        LargeCell(
            "gpt-oss-20b",
            16 * GB,
            (
                _ours(13.8),
                Arm("mxfp4", "llama.cpp MXFP4, mapped", 13.8, "MXFP4_MOE", wanted=1.0),
                Arm("mxfp4-repack", "llama.cpp MXFP4", 13.8, "MXFP4_MOE", repack=True, wanted=1.0),
            ),
        ),
        LargeCell(
            "gpt-oss-20b",
            8 * GB,
            (
                _ours(8.0),
                Arm("mxfp4", "llama.cpp MXFP4, mapped", 13.8, "MXFP4_MOE", wanted=2.0),
                Arm("mxfp4-half", "llama.cpp MXFP4, half the experts", 8.7, "MXFP4_MOE", 16),
            ),
        ),
    )
}
"""llama.cpp at Q4_K_M (gpt-oss: as published) with the file mapped, and at the best types that fit the cap."""


def disk_help() -> str:
    """What the cells need, for ``--help``."""
    said = []
    for cell in LARGE.values():
        one = max(arm.disk for arm in cell.arms)
        files = {(arm.form, arm.experts): arm.disk for arm in cell.arms}
        said.append(f"{cell.key} {one:.0f} GB ({sum(files.values()):.0f} GB with --turns)")
    return "Disk, GGUF files and packages: " + ", ".join(said) + "."


class Files:
    """Makes and deletes what the arms of a cell need, below ``work``.

    Args:
        settings: as the ledger has them: ``layers`` and ``experts`` perhaps shrink the shape.
        written: PRECISION:DENSE of a package that is written, not fitted; empty for a fit.
        kept: the ``--work`` of ``true_shapes.py --keep``.
    """

    def __init__(
        self,
        cell: LargeCell,
        work: Path,
        llama_python: str,
        settings: Mapping[str, Any],
        written: str,
        kept: Path | None,
    ) -> None:
        self.cell, self.work, self.llama_python = cell, work, llama_python
        self._written, self._kept = written, kept
        shape: Any = SHAPES[cell.shape]
        if settings["layers"] is not None:
            shape = replace(shape, layers=settings["layers"])
        if settings["experts"] is not None:
            top = min(shape.top_k, settings["experts"])
            shape = replace(shape, experts=settings["experts"], top_k=top)
        self.shape = shape
        self._config = work / "config.json"
        self.work.mkdir(parents=True, exist_ok=True)
        self._config.write_text(json.dumps(shape.config()), encoding="utf-8")

    def path(self, arm: Arm) -> Path:
        """Where the arm's weights are, made if need be."""
        return self._gguf(arm) if arm.form else self._package()

    def _gguf_path(self, arm: Arm) -> Path:
        part = "" if arm.experts is None else f"-{arm.experts}"
        return self.work / f"{arm.form.lower()}{part}.gguf"

    def _gguf(self, arm: Arm) -> Path:
        out = self._gguf_path(arm)
        if not out.exists():
            words = ["--form", arm.form]
            if arm.experts is not None:
                words += ["--experts", str(min(arm.experts, self.shape.experts))]
            self._write(self.llama_python, "random_gguf", out, words)
        return out

    def _package(self) -> Path:
        if self._kept is not None:
            slug = f"{self.cell.shape}-{self.cell.cap // GB}GB"
            return self._kept / slug / "fit" / "out"
        if self._written:
            out = self.work / "package"
            if not (out / "conmoe.json").exists():
                precision, _, dense = self._written.partition(":")
                words = ["--precision", precision, "--dense-precision", dense or "source"]
                self._write(sys.executable, "random_package", out, words)
            return out
        out = self.work / "fit" / "out"
        if not (out / "conmoe.json").exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            name, files = f"generated/{self.cell.shape}", repository(self.shape)
            words = ["--calibration-tokens", str(CALIBRATION_TOKENS)]
            with serving(name, files, self.work) as hub:
                fit(hub, command_of(name, self.budget, out, words), self.work, out)
        return out

    @property
    def budget(self) -> str:
        """Ours, of the cap."""
        return f"{(self.cell.cap - MARGIN) // MIB}MiB"

    def _write(self, python: str, module: str, out: Path, words: Sequence[str]) -> None:
        print(f"{self.cell.key}: writing {out.name}", file=sys.stderr, flush=True)
        command = [python, "-m", f"benchmarks.comparison.{module}", "--config", str(self._config)]
        subprocess.run([*command, *words, "--out", str(out)], check=True, env=environment(2))

    def discard(self, arms: Sequence[Arm], later: Sequence[Arm]) -> None:
        """Delete the files of ``arms`` that ``later`` ones do not need; a kept package stays."""
        needed = {self._gguf_path(arm) for arm in later if arm.form}
        for arm in arms:
            if arm.form:
                if self._gguf_path(arm) not in needed:
                    self._gguf_path(arm).unlink(missing_ok=True)
            elif all(one.form for one in later):
                for name in ("package", "fit", "cache", "state"):
                    shutil.rmtree(self.work / name, ignore_errors=True)


def turn_of(arm: Arm, files: Files, job: Mapping[str, Any]) -> Turn:
    """One arm of a cell, ready to run."""
    path = files.path(arm)
    key = f"{files.cell.key} {arm.key}".replace(":", "-").replace(" ", "-")
    cap = files.cell.cap
    if not arm.form:
        own = {**job, "path": str(path), "budget": files.budget}
        shards = sorted(path.glob("*.safetensors"))
        return Turn(key, "ours", sys.executable, own, shards, cap)
    own = {**job, "path": str(path), "repack": arm.repack}
    return Turn(key, "llama", files.llama_python, own, [path], cap)


def rates(path: Path) -> dict[str, float]:
    """Bytes a second of memory and disk, now; ``path``: a large file to read."""
    from conmoe_edge.memory.bandwidth import memory_bandwidth

    return {"memory": memory_bandwidth(seconds=2.0) or 0.0, "disk": disk_read_rate(path)[0]}


def rows_of(cell: LargeCell, ledger: Ledger, cache_bytes: float) -> list[dict[str, Any]]:
    """A row an arm that was run, ours first, with its ratio: ours over it."""
    memory, disk = (ledger.best_rate(name) or 1.0 for name in ("memory", "disk"))
    rows: list[dict[str, Any]] = []
    for arm in cell.arms:
        runs = ledger.runs_of(f"{cell.key} {arm.key}".replace(":", "-").replace(" ", "-"))
        if not runs:
            continue
        row = make_row(Cell(arm.key, cell.cap, cell.key), runs, memory, disk, cache_bytes)
        notes = [run["notes"] for run in runs if run["notes"].get("dense_token_bytes")]
        rows.append(
            {
                **asdict(row),
                "label": arm.label,
                "wanted": arm.wanted,
                "file_bytes": runs[0].get("file_bytes"),
                "token_bytes": statistics.fmean(
                    one["dense_token_bytes"] + one["routed_token_bytes"] for one in notes
                )
                if notes
                else None,
                "note": kernel_note(notes),
                "ratio": None,
                "prompt_ratio": None,
            }
        )
    ours = next((row for row in rows if row["system"] == "ours" and row["speed"]), None)
    for row in rows:
        if ours is not None and row is not ours and row["speed"]:
            row["ratio"] = ours["speed"] / row["speed"]
            row["prompt_ratio"] = row["first"] / ours["first"]
    return rows


def lines_of(cell: LargeCell, ledger: Ledger, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For a reader."""
    here, settings = machine(), ledger.data["settings"]
    lines = [
        f"{cell.shape}'s shape under {cell.cap // GB} GB, {here['cpu']}, {settings['threads']} threads; memory "
        f"{ledger.best_rate('memory') / 1e9:.1f} GB/s, disk {ledger.best_rate('disk') / 1e9:.2f} GB/s",
        f"prompt of {settings['prompt_tokens']} tokens, {settings['steps']} steps or {settings['seconds']:.0f} s"
        + ("" if settings["layers"] is None else f"; only {settings['layers']} layers"),
        "",
        f"{'system':<36}{'GB':>6}{'tokens/s':>9}{'spread':>14}{'mean':>7}{'steps':>6}{'first s':>9}{'load s':>8}"
        f"{'peak GB':>9}{'read MB/tok':>12}{'hit':>6}{'bound':>7}{'ratio':>7}{'wanted':>7}{'prompt':>8}",
    ]
    for row in rows:
        size = row["file_bytes"]
        head = f"{row['label']:<36}{_number(None if size is None else size / 1e9, 6, 1)}"
        if row["speed"] is None:
            lines.append(f"{head}  {row['outcome']}")
            continue
        spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
        read, peak = (None if row[name] is None else row[name] for name in ("read", "peak"))
        line = (
            f"{head}{row['speed']:>9.2f}{spread:>14}{row['mean']:>7.2f}{row['steps']:>6}{row['first']:>9.1f}"
            f"{row['load']:>8.1f}{_number(None if peak is None else peak / 1e9, 9, 2)}"
            f"{_number(None if read is None else read / 1e6, 12, 1)}{_percent(row['hit'], 6)}"
            f"{_percent(row['bound'], 7)}{_number(row['ratio'], 7, 2)}{_number(row['wanted'], 7, 2)}"
            f"{_number(row['prompt_ratio'], 8, 2)}"
        )
        if row["ratio"] is not None and row["wanted"] is not None:
            line += "  holds" if row["ratio"] >= row["wanted"] else "  MISSED"
        line += row["note"]
        lines.append(line if row["outcome"] == "ok" else f"{line}  {row['outcome']}")
    ours = next((row for row in rows if row["system"] == "ours" and row["speed"]), None)
    if ours is not None and cell.least is not None:
        word = "holds" if ours["speed"] >= cell.least else "MISSED"
        lines.append(f"ours {ours['speed']:.2f} tokens/s, wanted {cell.least:g}  {word}")
    return lines


def report(cell: LargeCell, ledger: Ledger, cache_bytes: float) -> list[str]:
    """JSON and text under ``benchmarks/results``; the text's lines are returned."""
    rows = rows_of(cell, ledger, cache_bytes)
    lines = lines_of(cell, ledger, rows)
    small = "" if ledger.data["settings"]["layers"] is None else "-small"
    name = f"compare-{cell.shape}-{cell.cap // GB}gb{small}"
    RESULTS.mkdir(exist_ok=True)
    runs = [{k: v for k, v in run.items() if k != "tail"} for run in ledger.data["runs"]]
    data = {"machine": machine(), "cap": cell.cap, **ledger.data, "runs": runs, "rows": rows}
    write_json(RESULTS / f"{name}.json", data)
    (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def run(args: argparse.Namespace) -> None:
    """The cell of ``--shape``: make, run, report, delete."""
    cell = LARGE[args.shape]
    if args.layers is not None:
        # A slice of the model under the same slice of the cap shows that everything runs.
        cell = replace(cell, cap=args.slice_cap or cell.cap)
    settings = {
        "prompt_tokens": args.prompt_tokens,
        "steps": args.tokens,
        "seconds": args.seconds_per_arm,
        "threads": args.threads,
        "layers": args.layers,
        "experts": args.experts,
    }
    work = args.work / LARGE[args.shape].key.replace(":", "-")
    work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(work / f"run-{args.run}.json", settings)
    files = Files(cell, work, args.llama_python, settings, args.written, args.packages_from)
    config = files.shape.config()
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = head * config["num_key_value_heads"]
    middle = args.prompt_tokens + args.tokens / 2
    cache_bytes = config["num_hidden_layers"] * 2 * width * 2 * middle
    if args.report_only:
        print("\n".join(report(cell, ledger, cache_bytes)))
        return
    arms = [arm for arm in cell.arms if not args.cells or arm.key in args.cells]
    if not args.llama_python and any(arm.form for arm in arms):
        sys.exit("--llama-python is needed for llama.cpp's arms")
    prepare_operator()
    job = job_of(args)
    blocks = [arms] if args.turns else [[arm] for arm in arms]
    for number, block in enumerate(blocks):
        later = [arm for other in blocks[number + 1 :] for arm in other]
        _run_block(block, files, ledger, job, args, cache_bytes)
        if args.discard and not args.make_only:
            files.discard(block, later)
    print("\n".join(report(cell, ledger, cache_bytes)))


def _run_block(
    block: Sequence[Arm],
    files: Files,
    ledger: Ledger,
    job: Mapping[str, Any],
    args: argparse.Namespace,
    cache_bytes: float,
) -> None:
    cells = [Cell(arm.key, files.cell.cap, "", needed=True) for arm in block]
    by_key = {arm.key: arm for arm in block}
    prefix = f"{files.cell.key} ".replace(":", "-").replace(" ", "-")
    wanted = [
        (by_key[one.system], repeat)
        for one, repeat in order(cells, args.repeats, args.repeats)
        if not ledger.has(f"{prefix}{one.system}", repeat)
    ]
    if not wanted:
        return
    turns = {arm.key: turn_of(arm, files, job) for arm in dict.fromkeys(arm for arm, _ in wanted)}
    if args.make_only:
        return
    largest = max(
        (path for turn in turns.values() for path in turn.files), key=lambda p: p.stat().st_size
    )
    limit = args.load_seconds + args.prompt_seconds + args.seconds_per_arm

    def run(arm: Arm, repeat: int) -> dict[str, Any]:
        turn = turns[arm.key]
        entry = run_turn(turn, repeat, files.work / "jobs", args.threads, limit)
        return {**entry, "file_bytes": sum(path.stat().st_size for path in turn.files)}

    take_turns(
        *(ledger, wanted, run),
        rates=lambda: rates(largest),
        report=lambda: report(files.cell, ledger, cache_bytes),
    )


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def _percent(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(100 * value, '.0f') + '%':>{width}}"
