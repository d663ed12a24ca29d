"""Whether the hub can be reached at all, asked once and in seconds.

The hub's client tries a dead network six times, with growing pauses and a line for each. So its address is connected to
first, and what cannot be reached is said at once. Behind a proxy the proxy finds the address, and nothing is asked.
"""

from __future__ import annotations

import socket
import threading
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SECONDS = 4.0
"""After which an address counts as one that does not answer."""
_REMEMBERED = 10.0
"""Seconds for which a failure is believed: long enough for one command's questions."""

_reached: set[tuple[str, int]] = set()
_failed: dict[tuple[str, int], tuple[float, str]] = {}


def connection_problem() -> str:
    """Why the hub cannot be reached, in one line; empty where it can, or where only trying tells."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    host = parts.hostname
    if host is None or (parts.scheme in getproxies() and not proxy_bypass(host)):
        return ""
    address = (host, parts.port or (80 if parts.scheme == "http" else 443))
    if address in _reached:
        return ""
    when, why = _failed.get(address, (0.0, ""))
    if why and time.monotonic() - when < _REMEMBERED:
        return why
    why = _tried(address)
    if why:
        _failed[address] = (time.monotonic(), why)
    else:
        _reached.add(address)
    return why


def _tried(address: tuple[str, int]) -> str:
    """In a thread of its own, as looking a name up has no timeout."""
    said: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=SECONDS).close()
        except OSError as error:
            said.append(str(error).strip() or type(error).__name__)
        else:
            said.append("")

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return said[0] if said else f"{address[0]} did not answer within {SECONDS:g} s"
