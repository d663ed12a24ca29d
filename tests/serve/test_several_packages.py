"""Several packages in one server, as the official client sees it; each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest

from tests.patience import PATIENCE, wait_for
from tests.serve.conftest import Running, running_server

MIB = 1 << 20
TWO_FIT = "1250MB"
ONE_FITS = "1000MB"
QUESTION: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def folders(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three whole packages and a damaged one."""
    home = tmp_path_factory.mktemp("several")
    found = {name: home / name for name in ("one", "two", "three", "damaged")}
    for folder in found.values():
        shutil.copytree(package, folder)
    file = next(iter(sorted(found["damaged"].glob("prototypes-*"))))
    file.write_bytes(file.read_bytes()[:-1])
    return found


@contextlib.contextmanager
def serving_all(folders: dict[str, Path], budget: str, *words: str) -> Iterator[Running]:
    paths = [str(folder) for folder in folders.values()]
    with running_server(*paths, "--gpu", budget, *words) as running:
        yield running


def patient(server: Running, **more: Any) -> openai.OpenAI:
    return server.client(timeout=PATIENCE, **more)


def say(server: Running, model: str, **more: Any) -> str:
    asked = {"temperature": 0, "max_tokens": 12, "messages": QUESTION, **more}
    reply = patient(server).chat.completions.create(model=model, **asked)
    assert reply.model == model
    return reply.choices[0].message.content or ""


def loaded(server: Running) -> set[str]:
    return {one["id"] for one in server.get("/v1/models").json()["data"] if one["loaded"]}


def processes(server: Running) -> list[psutil.Process]:
    return [
        one
        for one in psutil.Process(server.process.pid).children(recursive=True)
        if one.status() != psutil.STATUS_ZOMBIE
        and "conmoe_edge.serve.worker_process" in one.cmdline()
    ]


def rss(server: Running) -> int:
    """Bytes of the server and all its processes."""
    everyone = [psutil.Process(server.process.pid), *processes(server)]
    return sum(one.memory_info().rss for one in everyone)


class Streaming(threading.Thread):
    """A stream that is read beside what the test does."""

    def __init__(self, server: Running, model: str, tokens: int) -> None:
        super().__init__()
        self.server, self.model, self.tokens = server, model, tokens
        self.text = ""
        self.error: Exception | None = None
        self.finish: str | None = None
        self.start()

    def run(self) -> None:
        asked: dict[str, Any] = {"temperature": 0, "max_tokens": self.tokens}
        try:
            for chunk in patient(self.server).chat.completions.create(
                model=self.model, messages=QUESTION, stream=True, **asked
            ):
                for choice in chunk.choices:
                    self.text += choice.delta.content or ""
                    self.finish = choice.finish_reason or self.finish
        except openai.APIError as error:
            self.error = error


def test_a_day_with_two_models(folders: dict[str, Path]) -> None:
    with serving_all(folders, TWO_FIT, "--alias", "small=two") as server:
        assert server.get("/health").status_code == 200
        assert loaded(server) == set() and processes(server) == []
        empty = rss(server)

        first = say(server, "one")  # loaded by being asked
        assert loaded(server) == {"one"}
        with server.held(after=4, pid=processes(server)[0].pid):
            stream = Streaming(server, "one", 600)  # is there while the other one is loaded
            wait_for(lambda: stream.text)
            assert say(server, "two") == first, "the same package, the same answer"
            assert loaded(server) == {"one", "two", "small"}
            assert stream.finish is None
        stream.join()
        assert stream.finish in ("length", "stop") and stream.text.startswith(first[:10])

        answers: list[str] = []
        threads = [
            threading.Thread(target=lambda name=name: answers.append(say(server, name)))
            for name in ("one", "two", "one", "two")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [first] * 4

        both = rss(server)
        say(server, "one", extra_body={"keep_alive": 0})
        wait_for(lambda: len(processes(server)) == 1)
        one = rss(server)
        print(f"\nMiB: nothing {empty // MIB}, both {both // MIB}, one unloaded {one // MIB}")
        assert loaded(server) == {"two", "small"}
        assert both - one > 250 * MIB, "what it held is back"
        assert empty < 96 * MIB, "as the budget counts it"

        with pytest.raises(openai.NotFoundError, match="'one', 'two', 'three', 'damaged'"):
            say(server, "four")
        with pytest.raises(openai.InternalServerError, match="damaged") as refused:
            say(server, "damaged")
        assert refused.value.status_code == 500
        assert (refused.value.body or {})["code"] == "model_not_loaded"  # type: ignore[index]
        with pytest.raises(openai.BadRequestError, match="keep_alive"):
            say(server, "two", extra_body={"keep_alive": "soon"})

        (process,) = processes(server)
        with server.held(after=4, pid=process.pid):
            broken = Streaming(server, "small", 1500)
            wait_for(lambda: broken.text)
            process.kill()
            broken.join()
        assert broken.error is not None and "ended" in str(broken.error)
        assert loaded(server) == set() and server.get("/health").status_code == 200

        now = server.metrics()
        assert now['conmoe_model_loads_total{model="one"}'] == 1
        assert now['conmoe_model_load_failures_total{model="damaged"}'] == 1
        assert now['conmoe_model_loaded{model="two"}'] == 0
        assert now['conmoe_answers_total{model="one",outcome="length"}'] >= 5
        assert now["conmoe_memory_planned_bytes"] == 0
    assert "Unloaded one, unused for 0s." in server.errors
    assert "signal 9" in server.errors


def test_that_answers_are_slow_for_want_of_a_compiler_is_said_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    bare = {"CXX": "none", "XDG_CACHE_HOME": str(tmp_path)}
    words = ("--gpu", "700MB", "--keep-alive", "0")
    with running_server(str(folders["one"]), *words, **bare) as server:
        for _ in range(2):
            say(server, "one", max_tokens=2)
            wait_for(lambda: not loaded(server))
    assert server.errors.count("Unloaded one") == 2
    assert server.errors.count("several times slower than they could be: CXX names no") == 1


@pytest.mark.slow
def test_one_makes_room_for_another(folders: dict[str, Path]) -> None:
    with serving_all(folders, ONE_FITS) as server:
        say(server, "one")
        with ThreadPoolExecutor(1) as pool:
            with server.held(after=4, pid=processes(server)[0].pid):
                stream = Streaming(server, "one", 600)
                wait_for(lambda: stream.text)
                other = pool.submit(lambda: say(server, "two"))
                server.wait_until({'conmoe_model_waiting{model="two"}': 1})
            text = other.result()  # waits for the stream, whose answer is whole
        stream.join()
        assert stream.finish in ("length", "stop") and stream.text.startswith(text[:10])
        assert loaded(server) == {"two"} and len(processes(server)) == 1
        names = ["one", "three", "two", "one"]
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda name=name: found.append(say(server, name)))
            for name in names
        ]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            with contextlib.suppress(psutil.NoSuchProcess):
                most = max(most, rss(server))
            time.sleep(0.1)
        assert found == [text] * len(names)
        assert most < 1000 * 10**6, f"{most:,}"
        assert "conmoe_model_planned_bytes" in server.get("/metrics").text


@pytest.mark.slow
def test_folders_that_change_under_it(folders: dict[str, Path], tmp_path: Path) -> None:
    mine = {name: tmp_path / name for name in ("one", "two")}
    for name, folder in mine.items():
        shutil.copytree(folders[name], folder)
    with serving_all(mine, TWO_FIT) as server:
        text = say(server, "one")
        shutil.rmtree(mine["one"])
        assert say(server, "one", extra_body={"keep_alive": 0}) == text, "what is loaded goes on"
        wait_for(lambda: not loaded(server))
        with pytest.raises(openai.InternalServerError, match=r"no folder|no package|not there"):
            say(server, "one")
        assert say(server, "two") == text
        shutil.copytree(folders["one"], mine["one"])
        manifest = json.loads((mine["one"] / "conmoe.json").read_text())
        (mine["one"] / "conmoe.json").write_text(json.dumps(manifest, indent=3))
        time.sleep(6)  # it is not tried again at once
        assert say(server, "one") == text
    assert "was replaced" in server.errors


@pytest.mark.slow
def test_every_api_goes_through(folders: dict[str, Path], tmp_path: Path) -> None:
    cache = ("--prompt-cache", str(tmp_path / "prompts"))
    with serving_all({"one": folders["one"]}, "700MB", "--keep-alive", "1m", *cache) as server:
        client = patient(server)
        text = say(server, "one")
        claude = anthropic.Anthropic(
            base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE
        )
        plain: dict[str, Any] = {"model": "one", "max_tokens": 12, "messages": QUESTION}
        reply: Any = claude.messages.create(**plain, extra_body={"temperature": 0})
        assert reply.content[0].text == text
        with claude.messages.stream(**plain, extra_body={"temperature": 0}) as stream:
            assert "".join(stream.text_stream) == text
        respond: Any = client.responses.create(
            model="one", input=QUESTION, temperature=0, max_output_tokens=12
        )
        assert respond.output_text == text
        schema = {
            "type": "object",
            "properties": {"n": {"enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        }
        wish = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        found = json.loads(say(server, "one", response_format=wish, max_tokens=60))
        assert found["n"] in (1, 2)
        tokens = httpx.post(f"{server.url}/tokenize", json={"model": "one", "content": "hi"})
        assert tokens.status_code == 200 and tokens.json()["count"]
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="one", input="x")
        stats = server.get("/stats").json()
        assert stats["model"] == "one" and stats["memory"]["budget"] < 700 * 10**6
        assert stats["models"] == [{"name": "one", "state": "loaded", "loaded": True}]
        assert server.get("/stats?model=none").status_code == 200  # one answers to any name
        say(server, "one", messages=[{"role": "system", "content": "Be brief. " * 200}, *QUESTION])
        assert list((tmp_path / "prompts").glob("*.safetensors"))
        with server.held(pid=processes(server)[0].pid):
            begun = client.chat.completions.create(
                model="one", messages=QUESTION, max_tokens=1500, stream=True
            )
            server.wait_until({'conmoe_running{model="one"}': 1})
            begun.close()  # a client that leaves ends its answer in the package's process
            server.wait_until({'conmoe_running{model="one"}': 0})


@pytest.mark.slow
def test_nothing_stays_behind_a_server_that_was_killed(folders: dict[str, Path]) -> None:
    gone = False
    # that it did not leave with 0 is what it is about
    with contextlib.suppress(AssertionError), serving_all(folders, TWO_FIT) as server:
        say(server, "one")
        (worker,) = processes(server)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
        gone = True
    assert gone
