"""A server of several packages: one socket, one budget, and a process for each package that is loaded. No torch.

``FrontServer(settings, models, ...).run()`` returns when it was stopped (SIGINT, SIGTERM): it takes in nothing more,
lets running answers finish for ``stop_seconds``, and ends all processes. Memory: ``FRONT_BYTES``, and the processes'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from conmoe_edge.errors import DoesNotFit
from conmoe_edge.memory.budget import Budget
from conmoe_edge.plan.least import least_size
from conmoe_edge.plan.needs import PYTHON_BYTES
from conmoe_edge.plan.requests import LARGEST_BODY, request_sizes
from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.forwarding import Forwarding
from conmoe_edge.serve.front_app import make_front_app
from conmoe_edge.serve.guard import Guard
from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.listening import Web, counted_path, listen, url_of
from conmoe_edge.serve.loading import Loading
from conmoe_edge.serve.metric_text import ModelMetrics
from conmoe_edge.serve.model_pool import ModelPool, PooledModel
from conmoe_edge.serve.prometheus import Metrics
from conmoe_edge.serve.settings import Settings
from conmoe_edge.serve.worker import Worker
from conmoe_edge.serve.worker_order import WorkerOrder
from conmoe_edge.units import MIB, human_size

FRONT_BYTES = 96 * MIB
"""Of this process: 60 MiB for Python and the libraries, and requests on their way."""
_RETRY_SECONDS = 2


class FrontServer:
    """Several packages behind one socket."""

    def __init__(
        self,
        settings: Settings,
        models: Sequence[PooledModel],
        loading: Loading,
        budget: Budget,
        *,
        keep_alive: float,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """Listens; nothing is loaded.

        Args:
            settings: where and to whom; name, folder and aliases are the models' own.
            models: the packages.
            loading: how each is opened, but for its folder and its part of the budget.
            budget: of all together.
            keep_alive: seconds that a package stays after its last answer.
            tell: gets one line for people.
            warn: gets one line of what is not as it should be.

        Raises:
            DoesNotFit: the budget holds no package whatever.
            UsageError: the address cannot be had.
        """
        settings.check()
        self._settings = settings
        self._loading = replace(loading, budget=budget)
        on_cpu = budget.device == "cpu"
        kept_back = FRONT_BYTES if on_cpu else 0
        if on_cpu and budget.device_bytes < kept_back + PYTHON_BYTES:
            raise _too_small(budget, kept_back + PYTHON_BYTES)
        self._socket = listen(settings.host, settings.port)
        self._forwarding = Forwarding()
        self._of_models = ModelMetrics()
        self.pool = ModelPool(
            models,
            self._start,
            total=budget.device_bytes - kept_back,
            start_bytes=PYTHON_BYTES if on_cpu else 0,
            kept_back=kept_back,
            keep_alive=keep_alive,
            tell=tell,
            warn=warn,
            last_look=self._last_look,
            gone=lambda model: self._of_models.gone(model.name),
        )
        limits = settings.limits
        metrics = Metrics()
        account = request_sizes(budget.device_bytes, 0, None).account
        intake = Intake(
            lambda: account, limits.queue + limits.parallel, limits.readers, lambda: _RETRY_SECONDS
        )
        app = make_front_app(
            self.pool, metrics, self._of_models, settings, intake, self._forwarding
        )
        guarded = Guard(
            app,
            settings,
            lambda path, status: metrics.request(counted_path(path), status),
            intake,
            self._largest_body,
        )
        self._web = Web(guarded, limits, self.pool.stop, self._at_end)

    @property
    def url(self) -> str:
        """Where it listens."""
        return url_of(self._socket)

    def run(self) -> None:
        """Serve until it is stopped."""
        try:
            self._web.run(sockets=[self._socket])
        finally:
            self._socket.close()

    async def _start(self, model: PooledModel) -> Worker:
        settings = replace(
            self._settings,
            folder=model.folder,
            name=model.name,
            aliases=model.aliases,
            host="127.0.0.1",
            port=0,
            allowed_hosts=(),
            allowed_origins=(),
            forwarded=True,
        )
        return await Worker.start(
            WorkerOrder(settings, replace(self._loading, folder=model.folder))
        )

    async def _last_look(self, model: PooledModel, worker: Worker) -> None:
        """What its counters came to."""
        text = await self._forwarding.look(worker, "/metrics")
        if text is not None:
            self._of_models.heard(model.name, text)

    async def _at_end(self) -> None:
        await self.pool.close()
        await self._forwarding.close()

    def _largest_body(self) -> int:
        """Bytes of a body.

        Raises:
            Busy: it is stopping.
        """
        if self.pool.stopping:
            raise Busy("stopping", 5)
        return LARGEST_BODY


def _too_small(budget: Budget, least: int) -> DoesNotFit:
    return DoesNotFit(
        f"A budget of {human_size(budget.device_bytes)} holds no package beside a server of several.",
        "each that is loaded has a process of its own, with Python and torch",
        f"--gpu SIZE with more than {least_size(least)}, or serve one package",
        least,
    )
