"""What the comparisons share: one arm run once under a cap, and a ledger of such runs that a stopped run goes on with.

The parent only starts children here, so it stays small.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.comparison.arms import MODULES
from benchmarks.comparison.capped import Capped, run_capped, says_out_of_memory
from benchmarks.measure import forget
from conmoe_edge.checkpoint.fs.atomic_files import write_json

ROOT = Path(__file__).resolve().parents[2]
Run = dict[str, Any]
Arm = TypeVar("Arm")


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm, once.

    Attributes:
        key: names it in files and ledgers.
        engine: of ``MODULES``.
        python: interpreter that runs it.
        job: what the arm is told.
        files: whose pages must not be in the cache when it starts.
        cap: bytes, ``None`` for all the memory there is.
    """

    key: str
    engine: str
    python: str
    job: Mapping[str, Any]
    files: Sequence[Path]
    cap: int | None = None


@dataclass
class Ledger:
    """The runs of one run id, on the disk after every one.

    Attributes:
        settings: the same whenever it goes on.
        data: ``settings``, ``rates`` and ``runs``, each run with its ``cell`` and ``repeat``.
    """

    path: Path
    settings: Mapping[str, Any]
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = {"settings": dict(self.settings), "rates": [], "runs": []}
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
            if self.data["settings"] != dict(self.settings):
                sys.exit(f"{self.path} was begun with other settings; take another --run")

    def has(self, key: str, repeat: int) -> bool:
        """Whether this was run already."""
        return any(one["repeat"] == repeat for one in self.runs_of(key))

    def add(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Append and save."""
        self.data[kind].append(dict(entry))
        write_json(self.path, self.data)

    def runs_of(self, key: str) -> list[Run]:
        """The repeats of a cell."""
        return [run for run in self.data["runs"] if run["cell"] == key]

    def best_rate(self, name: str) -> float:
        """The better of what was measured before and after: the harder bound."""
        return max((rates[name] for rates in self.data["rates"]), default=0.0)


def environment(threads: int) -> dict[str, str]:
    """For children: this repository first, and no network for transformers."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **own}


def run_turn(turn: Turn, repeat: int, work: Path, threads: int, seconds: float) -> Run:
    """Run it for at most ``seconds``, with its files dropped from the page cache before. ``work``: for its notes."""
    work.mkdir(parents=True, exist_ok=True)
    job_file, notes_file = work / f"{turn.key}.json", work / f"{turn.key}.notes.json"
    notes_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(dict(turn.job)), encoding="utf-8")
    forget(turn.files)
    command = [turn.python, "-m", MODULES[turn.engine], str(job_file), str(notes_file)]
    done = run_capped(command, turn.cap, seconds, environment(threads))
    notes = json.loads(notes_file.read_text(encoding="utf-8")) if notes_file.exists() else {}
    peaks = [peak for peak in (done.peak, notes.get("cgroup_peak")) if peak is not None]
    return {
        "cell": turn.key,
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


def take_turns(
    ledger: Ledger,
    wanted: Sequence[tuple[Arm, int]],
    run: Callable[[Arm, int], Run],
    rates: Callable[[], Mapping[str, float]],
    report: Callable[[], object],
) -> None:
    """Run each arm and repeat in turn; what this machine can do is measured before and behind, if there is any.

    Args:
        ledger: gets every run, and the rates.
        wanted: what was not run yet, in its order.
        run: gives the entry of one turn.
        rates: bytes a second of what is a bound here.
        report: writes the results; called after every turn.
    """
    if not wanted:
        return
    ledger.add("rates", rates())
    for arm, repeat in wanted:
        entry = run(arm, repeat)
        ledger.add("runs", entry)
        steps = entry["notes"].get("step_seconds") or []
        speed = f", {1 / statistics.median(steps):.2f} tokens/s" if steps else ""
        said = f"{entry['cell']} {repeat}: {entry['outcome']}{speed}"
        print(said, file=sys.stderr, flush=True)
        report()
    ledger.add("rates", rates())


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


def prepare_operator() -> str:
    """Have our CPU operator compiled before anything runs under a cap; why there is none, or nothing."""
    code = (
        "from conmoe_edge.offload.kernels.cpu.bindings import why_not; import sys; "
        "sys.stdout.write(why_not())"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(1))
    if found.stdout:
        print(f"no operator, all is slow: {found.stdout}", file=sys.stderr, flush=True)
    return found.stdout


def kernel_note(notes: Sequence[Mapping[str, Any]]) -> str:
    """What a line of a table says where arms of ours ran without the operator."""
    kernels = {one["stats"]["kernel"] for one in notes if "stats" in one}
    slow = sorted(one for one in kernels if not one.startswith("native"))
    return f"  kernel: {', '.join(slow)}" if slow else ""


def heldout_tokens(count: int) -> list[int]:
    """The first tokens of the held-out text, by the demo model's tokenizer; a child makes them."""
    code = (
        "import json, sys; from benchmarks.comparison.traces import text_tokens; "
        "print(json.dumps(text_tokens('heldout', 1, int(sys.argv[1]))[0].tolist()))"
    )
    command = [sys.executable, "-c", code, str(count)]
    found = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment(1), cwd=ROOT
    )
    return json.loads(found.stdout)


def job_of(args: argparse.Namespace) -> dict[str, Any]:
    """What every arm of a comparison is asked to do: the held-out text's first tokens, and the steps behind them."""
    tokens = heldout_tokens(args.prompt_tokens + args.tokens)
    return {
        "threads": args.threads,
        "context": -(-(args.prompt_tokens + args.tokens + 1) // 256) * 256,
        "prompt": tokens[: args.prompt_tokens],
        "text": tokens[args.prompt_tokens :],
        "steps": args.tokens,
        "seconds": args.seconds_per_arm,
    }
