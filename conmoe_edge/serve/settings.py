"""How a server is set up, and what is refused before it starts. No torch."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from conmoe_edge.errors import UsageError

DEFAULT_PORT = 8123


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, and all of them, may ask for.

    Attributes:
        messages: of a conversation.
        max_tokens: of an answer; ``None`` for as many as the context holds.
        queue: requests that wait, whatever they wait for: their tokens, their turn, or that their client reads.
        parallel: answers that are made at once.
        readers: bodies that arrive at once.
        header_seconds, body_seconds: for a request's head, and for its body, to arrive.
        send_seconds: for a client to read something of its answer.
        stop_seconds: for running answers to come to their end when the server is stopped.
        connections: open at once.

    How many bytes requests may have follows from the budget: ``plan/requests.py``.
    """

    messages: int = 512
    max_tokens: int | None = None
    queue: int = 64
    parallel: int = 4
    readers: int = 64
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    send_seconds: float = 60.0
    stop_seconds: int = 10
    connections: int = 512

    @property
    def answers(self) -> int:
        """Most answers to one request: half of the places that all requests share."""
        return max(1, (self.parallel + self.queue) // 2)


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the server listens and who may talk to it.

    Attributes:
        folder: the package.
        host, port: of the socket; port 0 takes a free one.
        name: of the model, for clients.
        api_key: what clients have to show; ``None`` for nothing.
        allowed_hosts: names under which the server may be reached, besides addresses and localhost.
        aliases: other names of the model.
        allowed_origins: of pages of other sites that may use this server; ``*`` for all.
        strict: whether fields that nobody knows, and other models' names, are refused.
        forwarded: whether requests come through a server of several packages, which names their clients.
        allow_special_tokens: whether control tokens that are spelt out in messages steer the model.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    name: str = "model"
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allow_special_tokens: bool = False
    aliases: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    strict: bool = False
    forwarded: bool = False
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Refuse what would be open to others.

        Raises:
            UsageError: no key for an address that others can reach, or a key that cannot be sent.
        """
        key = self.api_key
        if key is not None and (
            not key or not key.isascii() or not key.isprintable() or " " in key
        ):
            raise UsageError(
                "The API key is empty or has characters that cannot be sent.",
                "it travels in an HTTP header",
                f"CONMOE_API_KEY={secrets.token_urlsafe(24)}",
            )
        if key is None and not is_loopback(self.host):
            raise UsageError(
                f"{self.host} can be reached from other machines, and there is no API key.",
                "anybody could use this machine through it",
                f"CONMOE_API_KEY={secrets.token_urlsafe(24)} conmoe-edge serve {self.folder} "
                f"--host {self.host}",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_is_allowed(header: str, names: tuple[str, ...]) -> bool:
    """Whether a request's ``Host`` is a name of this server.

    A page of another site can let its own *name* point here (DNS rebinding), and its requests then
    carry that name. An address cannot be rebound, so any address is allowed.
    """
    name, bracket, _ = header.rpartition("]")
    host = name.removeprefix("[") if bracket else header.partition(":")[0]
    host = host.rstrip(".").lower()
    if host == "localhost" or host in {one.lower() for one in names}:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
