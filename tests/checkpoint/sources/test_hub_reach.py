"""A hub that does not answer is one line, within seconds, and what the cache has is used all the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from local_hub import put_into_cache

from conmoe_edge import api
from conmoe_edge.checkpoint.sources import hub_reach
from conmoe_edge.checkpoint.sources.locate import describe, find, locate
from conmoe_edge.cli.main import main
from conmoe_edge.errors import HubUnreachable

COMMIT = "0" * 40


def lead_to(address: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        patch.delenv(name, raising=False)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_CACHE", str(cache))
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(hub_reach, "_reached", set())
    patch.setattr(hub_reach, "_failed", {})
    huggingface_hub.close_session()


@pytest.fixture
def dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address where nobody listens. It is held all the time: a free port might get a listener of another test."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"https://127.0.0.1:{held.getsockname()[1]}"
        lead_to(address, tmp_path / "cache", monkeypatch)
        yield address


@pytest.mark.parametrize("call", [locate, find, describe])
def test_it_is_said_at_once(call: Any, dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, which would try six times, is never asked."""
    asked: list[str] = []
    monkeypatch.setattr(httpx.Client, "send", lambda _, request, **__: asked.append(request.url))
    with pytest.raises(HubUnreachable) as caught:
        call("org/name")
    assert asked == []
    assert caught.value.what == "org/name could not be fetched from the hub."
    assert "refused" in caught.value.why.lower() and "\n" not in caught.value.why
    assert "--offline" in caught.value.fix


def test_an_address_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose queue is full takes no more connections."""
    monkeypatch.setattr(hub_reach, "SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        address = silent.getsockname()
        waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(address)
            waiting.append(one)
        lead_to(f"https://127.0.0.1:{address[1]}", tmp_path, monkeypatch)
        why = hub_reach.connection_problem()
        for one in waiting:
            one.close()
    assert "timed out" in why or "did not answer" in why


def test_the_cache_serves_without_a_connection(dead: str, single: Path, tmp_path: Path) -> None:
    snapshot = put_into_cache(single, tmp_path / "cache", COMMIT)
    for call in (locate, find, describe):
        assert call("org/name").path == snapshot


def test_one_line_on_the_screen(dead: str) -> None:
    done = CliRunner().invoke(main, ["plan", "olmoe", "--gpu", "8GB", "--device", "cpu"])
    assert done.exit_code == 1
    asked, error, why, fix = done.stderr.splitlines()
    assert asked == "Asking the hub about allenai/OLMoE-1B-7B-0924 ..."
    assert error.startswith("error: allenai/OLMoE-1B-7B-0924 could not be fetched")
    assert why.startswith("  why:") and fix.startswith("  fix:")


def test_the_list_of_models_gives_up_at_the_first(dead: str) -> None:
    asked: list[str] = []
    with pytest.raises(HubUnreachable):
        api.models("8GB", online=True, on_plan=asked.append)
    assert len([name for name in asked if name != "demo"]) == 1
