"""The routes of a server of several packages: a request goes to the process of the package that it names. No torch.

``GET /`` the page, ``/health``, ``/stats``, ``/metrics``, ``/v1/models`` are answered here; every ``POST`` goes to a
process, which answers it as a server of one package does (``app.py``).
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from conmoe_edge.errors import ConmoeError
from conmoe_edge.serve.clients import client_of, unless_left
from conmoe_edge.serve.error_handlers import new_app
from conmoe_edge.serve.forwarding import Forwarding
from conmoe_edge.serve.guard import body_of, entry_of
from conmoe_edge.serve.http_errors import ApiError
from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.keep_alive import keep_alive_seconds
from conmoe_edge.serve.listening import ROUTES
from conmoe_edge.serve.metric_text import ModelMetrics
from conmoe_edge.serve.model_list import model_json
from conmoe_edge.serve.model_pool import RETRY_SECONDS, ModelPool, PooledModel
from conmoe_edge.serve.page_files import add_page
from conmoe_edge.serve.page_stats import stats_without_model
from conmoe_edge.serve.prometheus import CONTENT_TYPE, Metrics, escaped, family, single, taken_in
from conmoe_edge.serve.requests import MOST_VALUES, read_json
from conmoe_edge.serve.settings import Settings
from conmoe_edge.serve.worker import WorkerFailed

_MOST_VALUES = MOST_VALUES + (1 << 18)
"""Of a request: with a prompt of 262,144 numbers. How many there may be of a package's is its process's to say."""
_ANSWERED_THERE = sorted(ROUTES - {"/", "/health", "/metrics", "/stats", "/v1/models"})


def make_front_app(
    pool: ModelPool,
    metrics: Metrics,
    of_models: ModelMetrics,
    settings: Settings,
    intake: Intake,
    forwarding: Forwarding,
) -> FastAPI:
    """The application; its guard reads the bodies and opens their entries in ``intake``."""
    app = new_app()
    started = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        if pool.stopping:
            return JSONResponse({"status": "stopping"}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def scrape() -> Response:
        loaded = [one for one in pool.models if one.worker is not None]
        await asyncio.gather(*(hear(one) for one in loaded))
        lines = [
            *_of_pool(pool),
            *metrics.responses(),
            *taken_in(intake),
            *of_models.text(),
            "",
        ]
        return Response("\n".join(lines), media_type=CONTENT_TYPE)

    async def hear(model: PooledModel) -> None:
        worker = model.worker
        text = None if worker is None else await forwarding.look(worker, "/metrics")
        if text is not None and model.worker is worker:
            of_models.heard(model.name, text)

    @app.get("/stats")
    async def stats(model: str | None = None) -> Response:
        chosen = _latest(pool) if model is None else found(model)
        worker = chosen.worker
        text = None if worker is None else await forwarding.look(worker, "/stats")
        value = (
            json.loads(text)
            if text is not None
            else stats_without_model(chosen.name, "ready", Metrics(), len(chosen.waiters), settings)
        )
        value["models"] = [
            {"name": one.name, "state": one.state, "loaded": one.worker is not None}
            for one in pool.models
        ]
        return JSONResponse(value)

    @app.get("/v1/models")
    async def list_models() -> Response:
        data = [listed(one, name) for one in pool.models for name in one.names]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        return JSONResponse(listed(found(name), name))

    def listed(model: PooledModel, name: str) -> dict[str, Any]:
        value = {**model_json(name, started, loaded=model.worker is not None), "state": model.state}
        if model.error is not None:
            value["error"] = _reason(model.error[0])
        return value

    def found(name: Any) -> PooledModel:
        model = pool.named(name) if isinstance(name, str) else None
        if model is None and len(pool.models) == 1 and not settings.strict:
            return pool.models[0]  # it says itself that it has another name
        if model is not None:
            return model
        there = f"this server has {', '.join(repr(one.name) for one in pool.models)}"
        if name is None:
            raise ApiError(400, f"model is missing; {there}.", param="model")
        raise ApiError(
            404,
            f"The model {str(name)[:100]!r} is not here; {there}.",
            param="model",
            code="model_not_found",
        )

    async def forward(request: Request) -> Response:
        body = body_of(request.scope)
        value = read_json(body, _MOST_VALUES)
        model = found(value.get("model"))
        keep = _keep_alive(value.get("keep_alive"))
        user = value.get("user")
        client = client_of(request, user if isinstance(user, str) else None)
        del value
        entry = entry_of(request.scope)
        entry.enter(client)
        waiting = asyncio.ensure_future(pool.acquire(model, keep))
        entry.on_withdraw(waiting.cancel)
        try:
            worker = await unless_left(request, waiting)
        except ConmoeError as error:
            raise _not_loaded(model, error) from error
        entry.on_withdraw(lambda: False)
        return await forwarding.forward(request, body, worker, lambda: pool.release(model))

    for path in _ANSWERED_THERE:
        app.post(path)(forward)
    add_page(app)
    return app


def _latest(pool: ModelPool) -> PooledModel:
    """The package that was asked last; one that is there before one that is not."""
    return max(pool.models, key=lambda one: (one.worker is not None, one.used))


def _keep_alive(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return keep_alive_seconds(value)
    except ValueError:
        raise ApiError(
            400,
            'keep_alive: seconds, or a text such as "5m"; 0 unloads after the answer, -1 never.',
            param="keep_alive",
        ) from None


def _not_loaded(model: PooledModel, error: ConmoeError) -> ApiError:
    memory = isinstance(error, WorkerFailed) and error.memory
    return ApiError(
        503 if memory else 500,
        f"The model {model.name!r} cannot be loaded. {_reason(error)}",
        param="model",
        code="model_not_loaded",
        headers={"Retry-After": f"{RETRY_SECONDS:.0f}"} if memory else None,
    )


def _reason(error: ConmoeError) -> str:
    why = error.why.strip().rstrip(".")
    return f"{error.what} {why[:1].upper()}{why[1:]}.".removesuffix(" .")


def _of_pool(pool: ModelPool) -> list[str]:
    """What is where, and how often it came."""
    lines: list[str] = [*single("conmoe_ready", "gauge", "1 once requests are taken in.", 1)]
    rows = (
        ("conmoe_model_loaded", "gauge", "1 where the model is in memory."),
        ("conmoe_model_waiting", "gauge", "Requests that wait for the model to be loaded."),
        ("conmoe_model_planned_bytes", "gauge", "Of the budget, that the model was given."),
        ("conmoe_model_loads_total", "counter", "How often the model was loaded."),
        ("conmoe_model_load_failures_total", "counter", "How often it could not be."),
        ("conmoe_model_load_seconds", "gauge", "That the last load took."),
    )
    for name, kind, text in rows:
        lines += family(name, kind, text)
        for one in pool.models:
            values = {
                "conmoe_model_loaded": int(one.worker is not None),
                "conmoe_model_waiting": len(one.waiters),
                "conmoe_model_planned_bytes": pool.granted(one),
                "conmoe_model_loads_total": one.loads,
                "conmoe_model_load_failures_total": one.failures,
                "conmoe_model_load_seconds": round(one.load_seconds, 3),
            }
            lines.append(f'{name}{{model="{escaped(one.name)}"}} {values[name]}')
    lines += single("conmoe_memory_planned_bytes", "gauge", "Given to all models.", pool.used)
    lines += single("conmoe_memory_for_models_bytes", "gauge", "The budget of all.", pool.total)
    return lines
