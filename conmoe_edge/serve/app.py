"""The routes: from a checked request to answers of the engine.

``GET /`` the page, ``/health``, ``/stats``, ``/metrics``, ``/v1/models``;
``POST /v1/chat/completions``, ``/v1/completions``, ``/v1/responses``, ``/v1/messages`` (Anthropic's), ``/tokenize``,
``/detokenize``. Every error leaves as the error object of the API that was asked. A client that disconnects cancels
its answers, wherever they stand (``answering.py``).

A request goes through three waits, and is in the account of ``intake.py`` in each: for its tokens, for its turn, and
for its client to read. A text that cannot fit is refused before it is tokenised (``fewest_tokens.py``).
"""

from __future__ import annotations

import time

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from conmoe_edge.serve.answering import ClientLeft, answer
from conmoe_edge.serve.anthropic_api import MessageReply, chat_of_messages, count_of_messages
from conmoe_edge.serve.asking import Asking
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.http_errors import ApiError, as_api_error, body_for
from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.jobs import Busy
from conmoe_edge.serve.page_files import FILES, FOLDER
from conmoe_edge.serve.page_stats import page_stats
from conmoe_edge.serve.prometheus import CONTENT_TYPE, Metrics
from conmoe_edge.serve.replies import ChatReply, CompletionReply, model_json, models
from conmoe_edge.serve.responses_api import ResponseReply, chat_of_response
from conmoe_edge.serve.settings import Settings
from conmoe_edge.serve.tokenising import Tokenising


def make_app(
    engine: Engine, metrics: Metrics, settings: Settings, intake: Intake, tokenising: Tokenising
) -> FastAPI:
    """The application; its guard reads the bodies and opens their entries in ``intake``."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    started = int(time.time())
    asking = Asking(engine, settings, tokenising)

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return _response(error, request)

    @app.exception_handler(Busy)
    async def _busy(request: Request, error: Exception) -> Response:
        return _response(as_api_error(error), request)

    @app.exception_handler(ClientLeft)
    async def _left_early(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(404)
    async def _no_route(request: Request, error: Exception) -> Response:
        return _response(ApiError(404, "There is nothing at this address."), request)

    @app.exception_handler(405)
    async def _no_method(request: Request, error: Exception) -> Response:
        allowed = getattr(error, "headers", None)  # what would do
        return _response(ApiError(405, "Not by this method.", headers=allowed), request)

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        return _response(as_api_error(error), request)

    @app.get("/health")
    async def health() -> Response:
        state = engine.snapshot.state
        if state == "ready":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": state}, 503, {"Retry-After": "2"})

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(
            metrics.text(engine.snapshot, settings.name, intake), media_type=CONTENT_TYPE
        )

    @app.get("/stats")
    async def stats() -> Response:
        return JSONResponse(page_stats(engine, metrics, settings, intake))

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse(models(settings.name, settings.aliases, started))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        asking.check_name(name, strict=True)
        return JSONResponse(model_json(name, started))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted, asked = await asking.chat(request)
        per_prompt = wanted.n or 1
        reply = ChatReply(settings.name, asking.bytes_of, wanted.wants_usage, per_prompt)
        return await answer(engine, asked, reply, request)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        wanted, asked, echoes = await asking.completion(request)
        per_prompt = wanted.n or 1
        reply = CompletionReply(settings.name, asking.bytes_of, wanted.wants_usage, per_prompt)
        reply.echoes = echoes
        return await answer(engine, asked, reply, request)

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        wanted, asked = await asking.chat(request, chat_of_response)
        repeated = {"temperature": wanted.temperature, "top_p": wanted.top_p}
        reply = ResponseReply(settings.name, repeated)
        return await answer(engine, asked, reply, request)

    @app.post("/v1/messages")
    async def message(request: Request) -> Response:
        _, asked = await asking.chat(request, chat_of_messages)
        reply = MessageReply(settings.name, len(asked.prompts[0]))
        return await answer(engine, asked, reply, request)

    @app.post("/v1/messages/count_tokens")
    async def count(request: Request) -> Response:
        _, asked = await asking.chat(request, count_of_messages)
        return JSONResponse({"input_tokens": len(asked.prompts[0])})

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return JSONResponse(await asking.tokenize(request))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return JSONResponse(await asking.detokenize(request))

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise ApiError(
            400,
            "This model writes text and makes no embeddings; use a server with an embedding model for them.",
            code="unsupported_endpoint",
        )

    @app.get("/")
    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", media_type="text/html")

    @app.get("/page/{name:path}")
    async def page_file(name: str) -> Response:
        if name not in FILES:
            raise ApiError(404, "There is nothing at this address.")
        return FileResponse(FOLDER / name, media_type=FILES[name])

    return app


def _response(error: ApiError, request: Request) -> Response:
    return JSONResponse(body_for(error, request.url.path), error.status, error.headers)
