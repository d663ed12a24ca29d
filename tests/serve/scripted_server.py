"""The chat page in front of answers that a test wrote: markdown, reasoning, calls, errors, lost connections.

The demo model says nothing of the kind. The page's files, the headers, the events of a stream and the bodies of errors
are the server's own code; ``test_page_files.py`` compares the rest, ``/stats`` and ``/v1/models``, with a real server.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from conmoe_edge.offload.generation.answer_parts import Part, Said
from conmoe_edge.serve.guard import _HEADERS
from conmoe_edge.serve.http_errors import ApiError
from conmoe_edge.serve.jobs import Done, Finish, Usage
from conmoe_edge.serve.model_list import models
from conmoe_edge.serve.page_files import FILES, FOLDER
from conmoe_edge.serve.replies import ChatReply

MIB = 1 << 20
CONTEXT = 2048
STATS: dict[str, Any] = {
    "schema_version": 1,
    "model": "river-30b",
    "state": "ready",
    "queued": 0,
    "running": 0,
    "parallel": 4,
    "tokens_per_second": 0.0,
    "totals": {"answers": 3, "prompt_tokens": 120, "completion_tokens": 4711},
    "memory": {
        "device": "cpu",
        "used": 454 * MIB,
        "budget": 536 * MIB,
        "slots": 180 * MIB,
        "conversations": 12 * MIB,
        "conversations_planned": 24 * MIB,
        "requests": 0,
        "requests_planned": MIB,
    },
    "prompts": {
        "kept": 1,
        "chunks": 2,
        "bytes": 4096,
        "hits": 1,
        "misses": 2,
        "file_hits": 0,
        "file_bytes_read": 0,
        "file_bytes_written": 0,
    },
    "compute": {
        "kernel": "native, AVX512",
        "fast_path": {"summary": "native, 6 of 6 layers in one call"},
    },
    "cache": {
        "prototypes": 144,
        "resident": 96,
        "hits": 9000,
        "misses": 400,
        "disk_bytes": 310 * MIB,
        "host_bytes": 0,
        "policy": "lru",
    },
    "context": CONTEXT,
}


@dataclass
class Script:
    """One answer.

    Attributes:
        parts: as they come, ``pace`` seconds apart.
        tokens: that ``usage`` tells.
        breaks: the connection ends after the parts.
        fails: what the stream says in place of an end.
        refused: before anything comes.
    """

    parts: Sequence[Part] = ()
    finish: Finish = "stop"
    tokens: int = 20
    pace: float = 0.0
    breaks: bool = False
    fails: ApiError | None = None
    refused: ApiError | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Scripted:
    """The server, and what it was asked.

    Attributes:
        answers: the scripts for a last message, one after the other; the last one stays.
        asked: the bodies of all requests for an answer.
        stats: what ``/stats`` says.
        names: of ``/v1/models``.
        key: that requests need.
        context: tokens, of which a word of a message is one.
    """

    url: str = ""
    answers: dict[str, list[Script]] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(STATS)))
    names: list[str] = field(default_factory=lambda: ["river-30b"])
    key: str | None = None
    context: int = CONTEXT

    def says(self, question: str, *scripts: Script | str) -> None:
        """What comes to ``question``."""
        self.answers[question] = [
            one if isinstance(one, Script) else Script([Said(one)]) for one in scripts
        ]

    def next(self, body: dict[str, Any]) -> Script:
        """The answer to a request."""
        self.asked.append(body)
        needed = count(body["messages"])
        if needed >= self.context:
            return Script(refused=too_long(needed, self.context))
        scripts = self.answers.get(body["messages"][-1]["content"], [Script([Said("Yes.")])])
        return scripts.pop(0) if len(scripts) > 1 else scripts[0]


def count(messages: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of ``messages``, by this server's way of counting: four around each, and one a word."""
    return sum(4 + len((one["content"] or "").split()) for one in messages)


def too_long(needed: int, context: int) -> ApiError:
    """As ``context_limit.py`` says it."""
    what = f"The conversation needs {needed} tokens, and the memory was planned for {context}."
    code = "context_length_exceeded"
    return ApiError(400, f"{what} Nothing was cut.", param="messages", code=code)


class _Handler(BaseHTTPRequestHandler):
    scripted: Scripted
    protocol_version = "HTTP/1.0"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def _send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in _HEADERS:
            self.send_header(name.decode(), value.decode())
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), **headers)

    def _error(self, error: ApiError) -> None:
        named = {name.replace("-", "_"): value for name, value in error.headers.items()}
        self._json(error.body, error.status, **named)

    def _is_let_in(self) -> bool:
        key = self.scripted.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        message = "The API key is missing or wrong."
        self._error(ApiError(401, message, code="invalid_api_key"))
        return False

    def do_GET(self) -> None:
        name = self.path.removeprefix("/page/")
        if self.path == "/":
            self._send(200, "text/html", (FOLDER / "index.html").read_bytes())
        elif name in FILES:
            self._send(200, FILES[name], (FOLDER / name).read_bytes())
        elif not self._is_let_in():
            return
        elif self.path == "/stats":
            self._json(self.scripted.stats)
        elif self.path == "/v1/models":
            first, *others = self.scripted.names
            self._json(models(first, others, 1, loaded=True))
        else:
            self._error(ApiError(404, "There is nothing at this address."))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_let_in():
            return
        if self.path == "/tokenize":
            number = count(body["messages"])
            if number >= 20 * self.scripted.context:
                self._error(too_long(number, self.scripted.context))
                return
            value = {"tokens": [0] * number, "count": number}
            self._json({**value, "max_model_len": self.scripted.context})
        else:
            self._answer(body)

    def _answer(self, body: dict[str, Any]) -> None:
        script = self.scripted.next(body)
        if script.refused is not None:
            self._error(script.refused)
            return
        reply = ChatReply(body["model"], lambda token: b"", True)
        with contextlib.suppress(ConnectionError):
            self._send(200, "text/event-stream", reply.start(), **script.headers)
            for part in script.parts:
                self.wfile.write(reply.more(0, [part], []))
                time.sleep(script.pace)
            if script.fails is not None:
                self.wfile.write(reply.failed(script.fails))
            elif not script.breaks:
                usage = Usage(10, script.tokens, 0)
                self.wfile.write(reply.end(0, Done(script.finish, usage)) + reply.close())


@contextlib.contextmanager
def scripted_server(port: int = 0) -> Iterator[Scripted]:
    """Until the end of the block, at a free port of this machine."""
    scripted = Scripted()
    handler = type("Handler", (_Handler,), {"scripted": scripted})
    httpd = ThreadingHTTPServer(("127.0.0.1", port), handler)
    httpd.daemon_threads = True
    scripted.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield scripted
    finally:
        httpd.shutdown()
        httpd.server_close()


def words(text: str) -> list[Part]:
    """``text`` as a model says it."""
    return [Said(piece) for piece in re.findall(r"\s*\S+\s*", text)]
