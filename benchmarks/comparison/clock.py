"""What every arm of the comparison does inside its own process: load, prompt, steps, and the clock.

An arm is a class with ``load``, ``prompt`` and ``step``. ``main`` runs it as a job says and writes
what it has measured so far into a file after every stage, so that an arm which is killed still
tells how far it came. Bytes are those that the kernel fetched from the disk for this process
(``/proc/self/io``: reads of the page cache do not count, faults of mapped files do).

Only the standard library is imported here: the arm of llama.cpp lives in another environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import cgroup_peak, own_memory_cgroup

LEAST_STEPS = 3


class Arm:
    """What is measured. ``job`` is the arm's own part of the job file."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def load(self) -> None:
        """Open the model."""
        raise NotImplementedError

    def prompt(self, tokens: Sequence[int]) -> int:
        """Forget everything, compute the prompt, return the first token of the answer."""
        raise NotImplementedError

    def step(self, token: int) -> int:
        """Feed the last token, return the next."""
        raise NotImplementedError

    def mark(self) -> None:
        """Called between prompt and steps; an arm that counts starts over here."""

    def facts(self) -> dict[str, Any]:
        """What else to report, at the end."""
        return {}


def bytes_read() -> int | None:
    """Bytes that the disk was asked for on behalf of this process so far; ``None`` where not known."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


class Notes:
    """The measurements so far, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {}

    def add(self, **values: Any) -> None:
        """Add and write."""
        self.values |= values
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.values), encoding="utf-8")
        part.replace(self._path)


def _difference(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before


def run(arm: Arm, job: dict[str, Any], notes: Notes) -> None:
    """Load, prompt, steps.

    ``job``: ``prompt`` (tokens), ``text`` (the tokens that follow it), ``steps``, ``seconds`` (the
    steps end after that long, but not before there are three), ``warm`` (compute the prompt a
    second time and count that one).
    """
    start, before = time.perf_counter(), bytes_read()
    arm.load()
    notes.add(
        stage="prompt",
        load_seconds=time.perf_counter() - start,
        load_bytes=_difference(bytes_read(), before),
    )
    prompt: list[int] = job["prompt"]
    text: list[int] = job["text"]
    start, before = time.perf_counter(), bytes_read()
    token = arm.prompt(prompt)
    first = time.perf_counter() - start
    notes.add(prompt_tokens=len(prompt), first_prompt_seconds=first, first_token_seconds=first)
    notes.add(prompt_bytes=_difference(bytes_read(), before))
    if job.get("warm"):
        start = time.perf_counter()
        token = arm.prompt(prompt)
        notes.add(first_token_seconds=time.perf_counter() - start)

    notes.add(stage="steps")
    arm.mark()
    before, seconds, tokens = bytes_read(), [], [token]
    begin = time.perf_counter()
    while len(seconds) < job["steps"]:
        if len(seconds) >= LEAST_STEPS and time.perf_counter() - begin > job["seconds"]:
            break
        # The text's own tokens, not the arm's: random weights soon say the same word for ever, and ask for the same
        # experts for ever.
        fed = text[len(seconds) % len(text)]
        start = time.perf_counter()
        token = arm.step(fed)
        seconds.append(time.perf_counter() - start)
        tokens.append(token)
        if sum(seconds) > 1.0 or len(seconds) == job["steps"]:
            notes.add(step_seconds=seconds, steps_bytes=_difference(bytes_read(), before))
    notes.add(
        stage="done",
        step_seconds=seconds,
        steps_bytes=_difference(bytes_read(), before),
        tokens=tokens,
        cgroup_peak=cgroup_peak(own_memory_cgroup()),
        **arm.facts(),
    )


def main(kind: type[Arm]) -> None:
    """``python -m MODULE JOB.json NOTES.json``"""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    notes = Notes(Path(sys.argv[2]))
    notes.add(stage="load", pid=os.getpid())
    run(kind(job), job, notes)
    sys.stdout.flush()
    os._exit(0)  # nothing is worth the seconds that tearing gigabytes down would take
