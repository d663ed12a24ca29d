"""A server's life: listen, load, answer, stop.

``Server(settings, load, ...).run()`` returns when it was stopped (SIGINT, SIGTERM) and everything is given
back. The socket listens before the model is there, so that ``/health`` can say so; nothing is printed.
Stopping takes in nothing more, lets running answers finish for ``stop_seconds``, then ends them within a
token; a second Ctrl-C does so at once. Raises what loading raised, and ``UsageError`` for an address that
cannot be had.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from conmoe_edge.errors import UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.tokenizers import load_tokenizer
from conmoe_edge.offload.generation.grammar import GrammarMaker
from conmoe_edge.offload.generation.named_templates import choose_template
from conmoe_edge.offload.generation.prompt_files import PromptFiles
from conmoe_edge.plan.requests import request_sizes
from conmoe_edge.serve.app import make_app
from conmoe_edge.serve.connection import timed
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.fewest_tokens import fewest_tokens
from conmoe_edge.serve.guard import Guard
from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.jobs import Busy, Loaded
from conmoe_edge.serve.prometheus import Metrics
from conmoe_edge.serve.settings import Settings
from conmoe_edge.serve.tokenising import Tokenising

_ROUTES = frozenset(
    {
        "/",
        "/detokenize",
        "/health",
        "/metrics",
        "/stats",
        "/tokenize",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/responses",
    }
)


class Stopped(Exception):
    """Loading was broken off because the server is stopping."""


class Server:
    """One package behind one socket."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[Callable[[int, int], None]], Loaded],
        *,
        on_ready: Callable[[Loaded], None] | None = None,
    ) -> None:
        """``load`` gets a progress callback; ``on_ready`` gets what was loaded, on another thread.

        Raises:
            UsageError: the address cannot be had.
        """
        settings.check()
        self.settings = settings
        self.metrics = Metrics()
        self._socket = _listen(settings.host, settings.port)
        self._error: BaseException | None = None
        self._stopping = False

        def loaded() -> Loaded:
            value = load(self._on_progress)
            if on_ready is not None and not self._stopping:
                on_ready(value)
            return value

        self.engine = Engine(
            loaded,
            parallel=settings.limits.parallel,
            queue=settings.limits.queue,
            metrics=self.metrics,
            on_end=self._on_engine_end,
        )
        limits = settings.limits
        places = limits.queue + limits.parallel
        self.intake = Intake(
            lambda: self.engine.sizes.account, places, limits.readers, self.engine.wait_estimate
        )
        # Twice, since a text that was pushed out leaves its queue a moment after its place.
        self._tokenising = Tokenising(2 * places)
        app = make_app(self.engine, self.metrics, settings, self.intake, self._tokenising)
        guarded = Guard(app, settings, self._count, self.intake, self._largest_body)
        config = uvicorn.Config(
            guarded,
            http=timed(limits.header_seconds, limits.send_seconds, limits.connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=limits.stop_seconds,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=16 << 10,
        )
        self._web = _Web(config, self._on_stop)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until it is stopped.

        Raises:
            ConmoeError: the package cannot be loaded.
        """
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        self.engine.start()
        try:
            self._web.run(sockets=[self._socket])
        finally:
            self._on_stop()
            self._tokenising.stop()
            self.engine.join(timeout=30)
            self._socket.close()
        if self._error is not None and not isinstance(self._error, Stopped):
            raise self._error

    def _largest_body(self) -> int:
        """Bytes of a body.

        Raises:
            Busy: the model is not there yet, and neither is its budget.
        """
        state = self.engine.snapshot.state
        if self.engine.loaded is None or state == "loading":
            raise Busy("loading" if state == "loading" else "stopping", 5)
        return self.engine.sizes.body

    def _on_stop(self) -> None:
        self._stopping = True
        self.engine.stop()

    def _on_progress(self, done: int, total: int) -> None:
        if self._stopping:
            raise Stopped

    def _on_engine_end(self, error: BaseException | None) -> None:
        if error is not None:
            self._error = error
        self._web.should_exit = True

    def _count(self, path: str, status: int) -> None:
        """Other paths count together, so that requests cannot make labels without end."""
        known = path if path in _ROUTES else "other"
        self.metrics.request(known, status)


class _Web(uvicorn.Server):
    """uvicorn with a callback when it begins to stop; a signal is no error."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take in nothing more; then as uvicorn does."""
        self._on_stop()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """As uvicorn's, without sending the signal once more at the end."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def package_loader(
    folder: Path,
    *,
    budget: Budget | None,
    device: str | None,
    context: int | None,
    cache_policy: str | None,
    misses: str = "copy",
    template: str | None = None,
    kv_precision: str | None = None,
    prompt_cache: Path | None = None,
    prompt_cache_bytes: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Callable[[Callable[[int, int], None]], Loaded]:
    """What opens a package for a server: the model inside its budget, and its tokenizer, with the chat template of that
    name where one is given; ``prompt_cache`` is where prompts are kept over restarts, ``tell`` as of ``PromptFiles``.
    """

    def load(progress: Callable[[int, int], None]) -> Loaded:
        tokenizer = load_tokenizer(folder)
        if template is not None:
            choose_template(tokenizer, template)
        fewest = fewest_tokens(tokenizer)
        tokenizer("")  # its first call writes to what all threads share

        def beside(budget_bytes: int, tokens: int) -> int:
            return request_sizes(budget_bytes, tokens, fewest.longest).nbytes

        model: Any = load_package(
            folder,
            budget=budget,
            device=device,
            context=context,
            cache_policy=cache_policy,
            misses=misses,
            beside=beside,
            progress=progress,
            kv_precision=kv_precision,
        )
        files = None
        if prompt_cache is not None:
            files = PromptFiles.of_model(
                model, prompt_cache, most_bytes=prompt_cache_bytes, tell=tell
            )
        return Loaded(model, tokenizer, fewest, files, GrammarMaker.of_model(model, tokenizer))

    return load


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{host}:{port} cannot be listened on.",
            (reason or str(error)).lower(),
            f"--port {port + 1 if 0 < port < 65535 else 0}, or --host 127.0.0.1",
        ) from error
