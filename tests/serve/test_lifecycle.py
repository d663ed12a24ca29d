"""Start, load, stop; and connections that misbehave."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.patience import PATIENCE, wait_for
from tests.serve.conftest import NAME, Running, command, environment, started_server


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("serve", *words),
        capture_output=True,
        text=True,
        env=environment(**variables),
        timeout=PATIENCE,
    )


def test_an_open_address_without_a_key_is_refused(package: Path) -> None:
    done = run(str(package), "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert "no API key" in done.stderr and "CONMOE_API_KEY=" in done.stderr


def test_what_cannot_be_served(tmp_path: Path) -> None:
    done = run(str(tmp_path / "absent"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "There is no folder" in done.stderr


def test_keys_that_cannot_be_had(package: Path, tmp_path: Path) -> None:
    done = run(str(package), "--api-key-file", str(tmp_path / "absent"))
    assert done.returncode == 2
    done = run(str(package), CONMOE_API_KEY="")
    assert done.returncode == 2
    assert "empty" in done.stderr


def test_a_life_from_loading_to_the_last_word(package: Path) -> None:
    words = (str(package), "--port", "0", "--name", NAME)
    with started_server(*words, still_loading=True, CONMOE_API_KEY="k" * 9) as server:
        process, server.key = server.process, "k" * 9
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("Loading "))
        server.url = said.split()[2].removesuffix("/health")
        loading = server.get("/health")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        assert "retry-after" in loading.headers
        with pytest.raises(openai.InternalServerError) as early:
            server.client().completions.create(model=NAME, prompt="x", max_tokens=1)
        assert early.value.status_code == 503
        server.holds.let_load()
        wait_for(lambda: server.get("/health").status_code == 200)
        assert server.get("/health").json() == {"status": "ok"}
        with server.held():
            stream = server.client().chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": "Tell me about the sea."}],
                max_tokens=30,
                temperature=0,
                stream=True,
            )
            server.wait_until({"conmoe_running": 1})
            process.send_signal(signal.SIGTERM)  # what runs may finish
            wait_for(lambda: _takes_nobody(server))
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert errors.rstrip().endswith("Stopped.")


def _takes_nobody(server: Running) -> bool:
    """Whether its socket is closed."""
    try:
        server.get("/health")
    except httpx.ConnectError:
        return True
    return False


@pytest.mark.slow
def test_budgets_and_ports_that_cannot_be_had(package: Path) -> None:
    done = run(str(package), "--gpu", "100MB", "--device", "cpu", "--port", "0")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(str(package), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "cannot be listened on" in done.stderr


@pytest.mark.slow
def test_slow_heads_and_bodies_do_not_hold_a_connection(server: Running) -> None:
    heads = [_connection(server) for _ in range(20)]
    for connection in heads:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
    body = _connection(server)
    body.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    open_ones = set(heads)

    def all_closed() -> bool:
        assert server.get("/health").status_code == 200
        for connection in list(open_ones):
            try:
                connection.sendall(b"x")  # a byte now and then does not help
            except OSError:
                open_ones.discard(connection)
        return not open_ones

    wait_for(all_closed)
    assert b" 408 " in body.recv(1000)
    for connection in (*heads, body):
        connection.close()


def _connection(server: Running) -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname and address.port
    return socket.create_connection((address.hostname, address.port), timeout=PATIENCE)


def test_two_hundred_connections(server: Running) -> None:
    memory = server.metrics()["conmoe_memory_bytes"]
    many = [_connection(server) for _ in range(200)]
    for connection in many:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for connection in many:
        assert b" 200 " in connection.recv(2000)
        connection.close()
    assert server.get("/health").status_code == 200
    assert server.metrics()["conmoe_memory_bytes"] < memory + (32 << 20)
