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
from fastapi.responses import JSONResponse

from conmoe_edge.serve.answering import answer
from conmoe_edge.serve.anthropic_api import MessageReply, chat_of_messages, count_of_messages
from conmoe_edge.serve.asking import Asking
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.error_handlers import new_app
from conmoe_edge.serve.http_errors import ApiError
from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.model_list import model_json, models
from conmoe_edge.serve.page_files import add_page
from conmoe_edge.serve.page_stats import page_stats
from conmoe_edge.serve.prometheus import CONTENT_TYPE, Metrics
from conmoe_edge.serve.replies import ChatReply, CompletionReply
from conmoe_edge.serve.responses_api import ResponseReply, chat_of_response
from conmoe_edge.serve.settings import Settings
from conmoe_edge.serve.tokenising import Tokenising


def make_app(
    engine: Engine, metrics: Metrics, settings: Settings, intake: Intake, tokenising: Tokenising
) -> FastAPI:
    """The application; its guard reads the bodies and opens their entries in ``intake``."""
    app = new_app()
    started = int(time.time())
    asking = Asking(engine, settings, tokenising)

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
        loaded = engine.loaded is not None
        return JSONResponse(models(settings.name, settings.aliases, started, loaded=loaded))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        asking.check_name(name, strict=True)
        return JSONResponse(model_json(name, started, loaded=engine.loaded is not None))

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

    add_page(app)
    return app
