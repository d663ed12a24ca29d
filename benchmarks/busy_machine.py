"""Answers beside other busy processes, by how long the operator's threads and torch's stay awake.

    conmoe-edge fit demo --gpu 2GB --device cpu --out /data/demo-out --yes
    python -m benchmarks.busy_machine --package /data/demo-out

A worker a way of waiting, each with the package open, asked in turns: tokens a second of an answer and of a prompt of
512 tokens, with no other busy process beside it, with one, and with two, which count in a loop. The demo is the hardest
case: its token takes little over a millisecond, in which threads meet some fifty times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from conmoe_edge.checkpoint.fs.atomic_files import write_json
from conmoe_edge.waiting_threads import AWAKE_VARIABLE, POLICY_VARIABLE, SPIN_VARIABLE

RESULTS = Path(__file__).resolve().parent / "results"
_OWN_TURNS = 300_000
"""libgomp's, where there are no more threads than processors."""
WAYS: dict[str, dict[str, str]] = {
    "as it is": {},
    **{f"{time} us": {AWAKE_VARIABLE: str(time)} for time in (0, 20, 50, 100, 200, 1000)},
    "torch's own": {SPIN_VARIABLE: str(_OWN_TURNS)},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_PROMPT, _ANSWER = 512, 256


def work(package: str) -> None:
    """A worker: a line in, a line out."""
    import torch

    import conmoe_edge

    model: Any = conmoe_edge.load(package)

    def ids(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(5, model.config.vocab_size, (1, count), generator=generator)

    @torch.no_grad()
    def answer(seconds: float) -> float:
        out = model(ids(32, 0), use_cache=True)
        cache, made, start = out.past_key_values, 0, time.perf_counter()
        while made < _ANSWER and (made == 0 or time.perf_counter() - start < seconds):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=cache, use_cache=True)
            made += 1
            if made == 1:
                start = time.perf_counter()
        return (made - 1) / (time.perf_counter() - start) if made > 1 else 0.0

    @torch.no_grad()
    def prompt() -> float:
        start = time.perf_counter()
        model(ids(_PROMPT, 1), use_cache=True, logits_to_keep=1)
        return _PROMPT / (time.perf_counter() - start)

    answer(0.5)
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(1.5) if line.strip() == "answer" else prompt(), flush=True)


class Worker:
    """Another process with the package open."""

    def __init__(self, package: Path, way: dict[str, str]) -> None:
        own = {AWAKE_VARIABLE, POLICY_VARIABLE, SPIN_VARIABLE, "OMP_NUM_THREADS"}
        env = {key: one for key, one in os.environ.items() if key not in own} | way
        command = [sys.executable, "-m", "benchmarks.busy_machine", "--worker", str(package)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a worker ended")
        return line

    def ask(self, what: str) -> float:
        """Tokens a second."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return float(self._line())

    def end(self) -> None:
        """No more questions."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """The table, printed and written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--package", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    if args.package is None:
        parser.error("--package is needed")
    workers = {name: Worker(args.package, way) for name, way in WAYS.items() if name in args.ways}
    lines = [f"{'':16}{'answer':>9}{'least':>9}{'prompt':>9}   tokens/s, medians, in turns"]
    rows: list[dict[str, Any]] = []
    for busy in (0, 1, 2):
        beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        answers: dict[str, list[float]] = {name: [] for name in workers}
        prompts: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(args.repeats):
            for name, worker in workers.items():
                answers[name].append(worker.ask("answer"))
                prompts[name].append(worker.ask("prompt"))
        for one in beside:
            one.kill()
            one.wait()
        lines.append(f"beside {busy} busy processes")
        for name in workers:
            row = {
                "busy": busy,
                "way": name,
                "answer": statistics.median(answers[name]),
                "least": min(answers[name]),
                "prompt": statistics.median(prompts[name]),
            }
            rows.append(row)
            lines.append(f"  {name:14}{row['answer']:9.1f}{row['least']:9.1f}{row['prompt']:9.0f}")
    for worker in workers.values():
        worker.end()
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "busy-machine.json", {"machine": machine(), "rows": rows})
    (RESULTS / "busy-machine.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
