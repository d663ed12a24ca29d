"""Settings of a server, and what is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.serve.settings import Settings, host_is_allowed


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("localhost:8123", True),
        ("LOCALHOST.:8123", True),
        ("127.0.0.1:8123", True),
        ("[::1]:8123", True),
        ("192.168.1.4", True),
        ("tower.local:80", True),
        ("evil.example:8123", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("[::1", False),
        ("a]b", False),
    ],
)
def test_names_that_may_call(host: str, allowed: bool) -> None:
    assert host_is_allowed(host, ("tower.local",)) is allowed


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "tower.local", ""])
def test_others_need_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="no API key") as caught:
        Settings(Path("out"), host=host).check()
    assert "CONMOE_API_KEY=" in caught.value.fix
    Settings(Path("out"), host=host, api_key="k" * 20).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    Settings(Path("out"), host=host).check()


@pytest.mark.parametrize("key", ["", "a b", "ключ", "a\nb"])
def test_keys_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(UsageError, match="key"):
        Settings(Path("out"), api_key=key).check()
