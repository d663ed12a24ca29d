"""A server's life: listen, load, answer, stop.

``Server(settings, load, ...).run()`` returns when it was stopped (SIGINT, SIGTERM) and everything is given
back. The socket listens before the model is there, so that ``/health`` can say so; nothing is printed.
Stopping takes in nothing more, lets running answers finish for ``stop_seconds``, then ends them within a
token; a second Ctrl-C does so at once. Raises what loading raised, and ``UsageError`` for an address that
cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable

from conmoe_edge.serve.app import make_app
from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.guard import Guard
from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.jobs import Loaded
from conmoe_edge.serve.listening import Web, counted_path, listen, url_of
from conmoe_edge.serve.prometheus import Metrics
from conmoe_edge.serve.settings import Settings
from conmoe_edge.serve.tokenising import Tokenising


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
        """``load`` gets a progress callback; ``on_ready`` gets what was loaded, on another thread, once requests are
        taken in.

        Raises:
            UsageError: the address cannot be had.
        """
        settings.check()
        self.settings = settings
        self.metrics = Metrics()
        self._socket = listen(settings.host, settings.port)
        self._error: BaseException | None = None
        self._stopping = False

        def ready(loaded: Loaded) -> None:
            if on_ready is not None and not self._stopping:
                on_ready(loaded)

        self.engine = Engine(
            lambda: load(self._on_progress),
            parallel=settings.limits.parallel,
            queue=settings.limits.queue,
            metrics=self.metrics,
            on_ready=ready,
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
        self._web = Web(guarded, limits, self._on_stop)

    @property
    def url(self) -> str:
        """Where it listens."""
        return url_of(self._socket)

    def run(self) -> None:
        """Serve until it is stopped.

        Raises:
            ConmoeError: the package cannot be loaded.
        """
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

    def stop(self) -> None:
        """Take in nothing more, and let ``run`` come to its end; from any thread."""
        self._on_stop()
        self._web.should_exit = True

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
        self.metrics.request(counted_path(path), status)
