"""How fast a server is with 1, 4 and 16 clients, and whether its answers stay the same.

    python -m benchmarks.serve_throughput ./out
    python -m benchmarks.serve_throughput ./out --gpu 560MB --clients 1 4 16 --json

It starts ``conmoe-edge serve`` on the package, with as many answers at once as ``--parallel`` says, and
lets so many clients ask greedily, each the next of its questions as soon as it has its answer. Columns:
tokens a second over all, and as one client sees them; seconds to the first token (median and the worst),
waiting included; prototypes that were there when asked for; bytes from the disk a token; memory; and how many of
the answers are, to the letter, what the same question gets alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

QUESTIONS = (
    "Tell me a short story about a lighthouse.",
    "What does a river carry to the sea?",
    "Write a Python function that adds two numbers.",
    "Name three rivers and say where they end.",
    "Why is the sky dark at night?",
    "Describe a market on a rainy morning.",
    "How do birds find their way?",
    "Explain what a prime number is.",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as its client saw it; seconds."""

    question: str
    text: str
    tokens: int
    first: float
    total: float


@dataclass(frozen=True, slots=True)
class Row:
    """One number of clients."""

    clients: int
    answers: int
    tokens: int
    tokens_per_second: float
    client_tokens_per_second: float
    first_median: float
    first_worst: float
    hit_rate: float
    disk_bytes_per_token: float
    memory_bytes: int
    budget_bytes: int | None
    same: int


class Served:
    """A server process; ``with`` ends it."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        command = [sys.executable, "-m", "conmoe_edge.cli.main", "serve", str(folder)]
        self._process = subprocess.Popen(
            [*command, "--port", "0", "--json", *words], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Served:
        lines: list[str] = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.append(line)
            if line.rstrip() == "}":
                break
        if not lines:
            raise SystemExit("the server did not start")
        value = json.loads("".join(lines))
        self.url, self.model = value["url"], value["model"]
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)

    def client(self) -> openai.OpenAI:
        """With a key that a server without one does not look at."""
        key = os.environ.get("CONMOE_API_KEY", "none")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=3600)

    def stats(self) -> dict[str, Any]:
        """``/stats``, once nothing runs any more."""
        key = os.environ.get("CONMOE_API_KEY", "none")
        while True:
            headers = {"Authorization": f"Bearer {key}"}
            value = httpx.get(f"{self.url}/stats", headers=headers).json()
            if value["running"] == value["queued"] == 0:
                return value
            time.sleep(0.1)


def ask(client: openai.OpenAI, model: str, question: str, tokens: int) -> Answer:
    """One streamed, greedy answer."""
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces: list[str] = []
    first = made = 0.0
    for chunk in stream:
        if chunk.usage is not None:
            made = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - start
            pieces.append(chunk.choices[0].delta.content)
    total = time.perf_counter() - start
    return Answer(question, "".join(pieces), int(made), first or total, total)


def measure(served: Served, clients: int, each: int, tokens: int, alone: dict[str, str]) -> Row:
    """``clients`` at once, each with ``each`` questions one after the other."""

    def one(number: int) -> list[Answer]:
        client = served.client()
        return [
            ask(client, served.model, QUESTIONS[(number + i) % len(QUESTIONS)], tokens)
            for i in range(each)
        ]

    before = served.stats()["cache"]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for many in pool.map(one, range(clients)) for answer in many]
    seconds = time.perf_counter() - start
    value = served.stats()
    hits, misses, disk = (
        value["cache"][name] - before[name] for name in ("hits", "misses", "disk_bytes")
    )
    made = sum(answer.tokens for answer in answers)
    after_first = [a.tokens / (a.total - a.first) for a in answers if a.total > a.first]
    firsts = [answer.first for answer in answers]
    return Row(
        clients=clients,
        answers=len(answers),
        tokens=made,
        tokens_per_second=made / seconds,
        client_tokens_per_second=statistics.median(after_first) if after_first else 0.0,
        first_median=statistics.median(firsts),
        first_worst=max(firsts),
        hit_rate=hits / (hits + misses) if hits + misses else 1.0,
        disk_bytes_per_token=disk / made,
        memory_bytes=value["memory"]["used"],
        budget_bytes=value["memory"]["budget"],
        same=sum(answer.text == alone[answer.question] for answer in answers),
    )


HEADS = (
    "clients answers  tokens/s  one client  first s  worst s    hit  MiB/token  memory MiB  same"
)


def line(row: Row) -> str:
    """A line of the table."""
    limit = "" if row.budget_bytes is None else f"/{row.budget_bytes / 2**20:.0f}"
    memory = f"{row.memory_bytes / 2**20:.0f}{limit}"
    return (
        f"{row.clients:7d} {row.answers:7d} {row.tokens_per_second:9.2f} "
        f"{row.client_tokens_per_second:11.2f} {row.first_median:8.2f} {row.first_worst:8.2f} "
        f"{100 * row.hit_rate:5.1f}% {row.disk_bytes_per_token / 2**20:10.3f} {memory:>11} "
        f"{row.same}/{row.answers}"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="a package that fit wrote")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--answers", type=int, default=4, help="questions of each client")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--parallel", type=int, default=4, help="answers that are made at once")
    parser.add_argument("--gpu", help="the budget; what the package was planned for by default")
    parser.add_argument("--context", help="tokens to keep room for, over all answers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON value instead of the table")
    given = parser.parse_args()
    words = ["--parallel", str(given.parallel), "--device", given.device, "--quiet"]
    for name in ("gpu", "context"):
        if getattr(given, name):
            words += [f"--{name}", getattr(given, name)]
    with Served(given.folder, words) as served:
        client = served.client()
        alone = {q: ask(client, served.model, q, given.tokens).text for q in QUESTIONS}
        rows = []
        if not given.json:
            print(HEADS)
        for clients in given.clients:
            rows.append(measure(served, clients, given.answers, given.tokens, alone))
            if not given.json:
                print(line(rows[-1]), flush=True)
        cache = served.stats()["cache"]
    if given.json:
        facts = {
            "schema_version": 1,
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "parallel": given.parallel,
            "tokens": given.tokens,
            "resident_at_the_end": cache["resident"],
            "prototypes": cache["prototypes"],
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
