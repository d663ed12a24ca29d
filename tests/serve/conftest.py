"""A package made from the demo model, once a session, and real server processes in front of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.patience import PATIENCE, wait_for
from tests.serve.held_rounds import FOLDER, Holds
from tests.serve.page_window import SIZES, Window, system_chromium
from tests.serve.scripted_server import Scripted, scripted_server

ROOT = Path(__file__).resolve().parents[2]
BUDGET = "562MB"
"""That of `make demo`: a server has to do with what chat has."""
LIBRARY_SPREAD = 20 << 20
"""The kernel maps more or fewer pages of torch's files with one that is touched, by how they lie in its page cache.
With the same private memory (331 MB), a server has had 198 MB of files in one installation and 210 MB in another.
"""
NAME = "demo-served"
KEY = "correct-horse-battery"
HELD = Path(__file__).with_name("held")


def environment(**more: str) -> dict[str, str]:
    """A server's environment: this source tree, one thread, no key of the user's own."""
    own = {k: v for k, v in os.environ.items() if k != "CONMOE_API_KEY"}
    path = os.pathsep.join([str(ROOT), *filter(None, [own.get("PYTHONPATH")])])
    return {**own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def command(*words: str) -> list[str]:
    """The command line, run by this interpreter."""
    return [sys.executable, "-m", "conmoe_edge.cli.main", *words]


@dataclass
class Running:
    """A server process; ``errors`` is what it said on stderr, once it is over."""

    process: subprocess.Popen[str]
    url: str
    holds: Holds
    key: str | None = None
    errors: str = ""

    def client(self, **settings: object) -> openai.OpenAI:
        """The real client; it does not try again on its own."""
        given = {"base_url": f"{self.url}/v1", "api_key": self.key or "none", "max_retries": 0}
        return openai.OpenAI(**{**given, "timeout": PATIENCE, **settings})

    def get(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.get(self.url + path, headers=headers, timeout=PATIENCE)

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels."""
        lines = self.get("/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def held(
        self, after: int = 0, pid: int | None = None
    ) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """No answer gets on behind the next ``after`` rounds of the server's process, or of process ``pid``, until the
        block ends: what runs at its beginning runs at its end, unless its client leaves. See ``Holds``."""
        return self.holds.held(self.process.pid if pid is None else pid, after)

    def wait_until(self, wanted: dict[str, float]) -> None:
        """Until the samples have these values."""
        seen: dict[str, float] = {}

        def there() -> bool:
            now = self.metrics()
            seen.update({name: now[name] for name in wanted})
            return seen == wanted

        wait_for(there, lambda: f"{seen} is not {wanted}")

    def idle(self) -> None:
        """Until nothing runs or waits."""
        self.wait_until({"conmoe_running": 0, "conmoe_queue_length": 0})


@contextlib.contextmanager
def serving(folder: Path, *words: str, **variables: str) -> Iterator[Running]:
    """A server of one package that is ready."""
    with running_server(str(folder), "--name", NAME, *words, **variables) as running:
        yield running


@contextlib.contextmanager
def running_server(*words: str, **variables: str) -> Iterator[Running]:
    """A server that is ready. It is stopped as a user would, and has to leave with 0."""
    with started_server(*words, "--port", "0", "--json", **variables) as running:
        process = running.process
        try:
            running.url = _ready(process)
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            _, running.errors = process.communicate(timeout=PATIENCE)
    errors = running.errors
    assert process.returncode == 0, errors
    assert "Traceback" not in errors, errors


@contextlib.contextmanager
def started_server(*words: str, still_loading: bool = False, **variables: str) -> Iterator[Running]:
    """A server that may not be ready yet, whose rounds can be held. It is over with the block.

    ``still_loading`` holds it before its package is opened, until ``holds.let_load``.
    """
    path = os.pathsep.join([str(HELD), environment()["PYTHONPATH"]])
    with tempfile.TemporaryDirectory() as folder:
        holds = Holds(Path(folder))
        if still_loading:
            holds.hold_loading()
        process = subprocess.Popen(
            command("serve", *words, "--device", "cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**variables, **{FOLDER: folder, "PYTHONPATH": path}),
        )
        try:
            yield Running(process, "", holds)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


def _ready(process: subprocess.Popen[str]) -> str:
    """The URL in the JSON value that says that it is ready."""
    found: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.rstrip() == "}":
                break
        found.put("".join(lines))

    threading.Thread(target=read, daemon=True).start()
    try:
        text = found.get(timeout=PATIENCE)
        return json.loads(text)["url"]
    except (queue.Empty, json.JSONDecodeError):
        process.kill()
        _, errors = process.communicate()
        raise AssertionError(f"the server did not start: {errors}") from None


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in 4 bits with a quarter of its experts gone, calibrated on little text."""
    out = tmp_path_factory.mktemp("served") / "out"
    calibration = tmp_path_factory.mktemp("text") / "text.txt"
    words = (ROOT / "conmoe_edge" / "data" / "texts" / "calibration.txt").read_text(
        encoding="utf-8"
    )
    calibration.write_text(words[:40_000], encoding="utf-8")
    levers = ("--precision", "int4", "--rate", "25%", "--offline", "--quiet", "--yes")
    text = ("--calibration", str(calibration), "--calibration-tokens", "2048")
    subprocess.run(
        command(
            "fit", "demo", "--gpu", BUDGET, "--device", "cpu", "--out", str(out), *levers, *text
        ),
        check=True,
        env=environment(),
        capture_output=True,
    )
    return out


@pytest.fixture(scope="session")
def server(package: Path) -> Iterator[Running]:
    """Without a key, on this machine only; for everything that leaves it as it was."""
    with serving(package) as running:
        yield running


@pytest.fixture(scope="session")
def strict(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With a key from a file, room for one answer and one that waits, and nothing unknown taken."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(KEY + "\n", encoding="utf-8")
    few = ("--api-key-file", str(file), "--parallel", "1", "--queue", "1")
    names = ("--strict", "--alias", "gpt-local", "--allow-origin", "https://ours.example")
    with serving(package, *few, *names) as running:
        running.key = KEY
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, for tests of the page."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=system_chromium(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """The page's files in front of answers that a test wrote."""
    with scripted_server() as found:
        yield found


@pytest.fixture
def window(browser: Any, scripted: Scripted) -> Iterator[Window]:
    """The page in front of them; scripts in it must not fail."""
    found = Window(browser, scripted.url, SIZES["desktop"])
    found.ready()
    yield found
    assert [problem for problem in found.problems if "Failed to load resource" not in problem] == []
    found.close()


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    return server.client()
