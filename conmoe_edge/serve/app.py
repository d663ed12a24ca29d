"""The routes: from a checked request to a job of the engine, and its events back to the client.

``GET /`` the page, ``/health``, ``/stats``, ``/metrics``, ``/v1/models``;
``POST /v1/chat/completions``, ``/v1/completions``. Every error leaves as OpenAI's error object. A client
that disconnects cancels its job.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from conmoe_edge.offload.generation.context_limit import context_full, longest_context
from conmoe_edge.offload.generation.prompt import prompt_tokens, text_tokens
from conmoe_edge.offload.generation.sampling_settings import LONGEST_ANSWER, SamplingSettings
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.http_errors import ApiError, as_api_error
from conmoe_edge.serve.jobs import Busy, Done, Event, Failed, Job, Loaded, Piece
from conmoe_edge.serve.page_stats import page_stats
from conmoe_edge.serve.prometheus import CONTENT_TYPE, Metrics
from conmoe_edge.serve.replies import STILL_HERE, Reply, event, model_json, models
from conmoe_edge.serve.requests import ChatRequest, CompletionRequest, read_request
from conmoe_edge.serve.settings import Settings

SIGN_OF_LIFE_SECONDS = 15.0
_PAGE = Path(__file__).parent / "page"
_FILES = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}


def make_app(engine: Engine, metrics: Metrics, settings: Settings) -> FastAPI:
    """The application, without its guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    started = int(time.time())
    tokenizing = threading.Lock()
    special = settings.allow_special_tokens

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return _response(error)

    @app.exception_handler(404)
    async def _no_route(request: Request, error: Exception) -> Response:
        return _response(ApiError(404, "There is nothing at this address."))

    @app.exception_handler(405)
    async def _no_method(request: Request, error: Exception) -> Response:
        allowed = getattr(error, "headers", None)  # what would do
        return _response(ApiError(405, "Not by this method.", headers=allowed))

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        return _response(as_api_error(error))

    @app.get("/health")
    async def health() -> Response:
        state = engine.snapshot.state
        if state == "ready":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": state}, 503, {"Retry-After": "2"})

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.text(engine.snapshot, settings.name), media_type=CONTENT_TYPE)

    @app.get("/stats")
    async def stats() -> Response:
        return JSONResponse(page_stats(engine, metrics, settings))

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse(models(settings.name, started))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        _known(name)
        return JSONResponse(model_json(name, started))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = read_request(await request.body(), ChatRequest, settings.limits.messages)
        _known(asked.model)
        messages = [message.plain() for message in asked.messages]
        loaded = _ready()
        if len(messages) > 1 and not getattr(loaded.tokenizer, "chat_template", None):
            raise ApiError(
                400,
                "This model has no chat template: send one message, or use /v1/completions.",
                param="messages",
            )
        tokens = await _in_thread(
            lambda: prompt_tokens(loaded.tokenizer, messages, allow_special_tokens=special)
        )
        return await _answer(request, asked, tokens, Reply(settings.name, True, asked.wants_usage))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = read_request(await request.body(), CompletionRequest, settings.limits.messages)
        _known(asked.model)
        loaded = _ready()
        prompt = asked.prompt
        if isinstance(prompt, list) and not isinstance(prompt[0], str):
            tokens = _checked([int(token) for token in prompt], loaded)
        else:
            text = prompt if isinstance(prompt, str) else str(prompt[0])
            tokens = await _in_thread(
                lambda: text_tokens(loaded.tokenizer, text, allow_special_tokens=special)
            )
        if not tokens:
            raise ApiError(400, "The prompt is empty.", param="prompt")
        return await _answer(request, asked, tokens, Reply(settings.name, False, asked.wants_usage))

    @app.get("/")
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", media_type="text/html")

    @app.get("/page/{name}")
    async def page_file(name: str) -> Response:
        if name not in _FILES:
            raise ApiError(404, "There is nothing at this address.")
        return FileResponse(_PAGE / name, media_type=_FILES[name])

    def _known(name: str) -> None:
        if name != settings.name:
            raise ApiError(
                404,
                f"The model {name[:100]!r} is not here; this server has {settings.name!r}.",
                param="model",
                code="model_not_found",
            )

    def _ready() -> Loaded:
        state = engine.snapshot.state
        if state != "ready" or engine.loaded is None:
            raise as_api_error(Busy("loading" if state == "loading" else "stopping", 5))
        return engine.loaded

    async def _in_thread(work: Any) -> list[int]:
        """Long prompts take a while to tokenise, and the loop has others to serve."""

        def alone() -> list[int]:
            with tokenizing:
                return work()

        try:
            return await asyncio.to_thread(alone)
        except Exception as error:
            raise as_api_error(error) from error

    async def _answer(
        request: Request,
        asked: ChatRequest | CompletionRequest,
        tokens: list[int],
        reply: Reply,
    ) -> Response:
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(one: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, one)
            except RuntimeError:  # the loop is closed, so no client is left
                engine.cancel(job)

        sampling = _sampling(asked, tokens, engine, settings)
        job = Job(tuple(tokens), sampling, _client(request, asked), tell)
        try:
            engine.submit(job)
        except Busy as busy:
            raise as_api_error(busy) from None
        if asked.stream:
            return AnswerStream(engine, job, _stream(events, reply))
        return await _whole(engine, job, events, reply, request)

    return app


class AnswerStream(StreamingResponse):
    """A stream whose end, whatever it is, is the end of its job: a client may be gone before the first
    byte was wanted.
    """

    def __init__(self, engine: Engine, job: Job, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._cancel = lambda: engine.cancel(job)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()


async def _stream(events: asyncio.Queue[Event], reply: Reply) -> AsyncIterator[bytes]:
    """Server-sent events until the answer is over."""
    yield reply.start()
    while True:
        try:
            one = await asyncio.wait_for(events.get(), SIGN_OF_LIFE_SECONDS)
        except TimeoutError:
            yield STILL_HERE
            continue
        if isinstance(one, Piece):
            yield reply.piece(one.text)
        elif isinstance(one, Done):
            yield reply.end(one.finish, one.usage)
            return
        else:
            yield event(as_api_error(one.error).body)
            return


async def _whole(
    engine: Engine, job: Job, events: asyncio.Queue[Event], reply: Reply, request: Request
) -> Response:
    """The answer in one piece; nothing where the client left before it was there."""
    making = asyncio.create_task(_collect(events, reply))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if making.done():
            return making.result()
        return Response(status_code=499)
    finally:
        engine.cancel(job)  # nothing happens where it is over
        making.cancel()
        leaving.cancel()


async def _collect(events: asyncio.Queue[Event], reply: Reply) -> Response:
    pieces: list[str] = []
    while True:
        one = await events.get()
        if isinstance(one, Piece):
            pieces.append(one.text)
        elif isinstance(one, Failed):
            raise as_api_error(one.error)
        else:
            return JSONResponse(reply.whole("".join(pieces), one.finish, one.usage))


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sampling(
    asked: ChatRequest | CompletionRequest, tokens: list[int], engine: Engine, settings: Settings
) -> SamplingSettings:
    """How the engine is to answer ``tokens``, within the limits.

    Raises:
        ApiError: the prompt leaves no room for an answer, or the answer may not be that long.
    """
    loaded = engine.loaded
    assert loaded is not None, "asked once it is ready"
    context, most = engine.context, settings.limits.max_tokens
    if len(tokens) > context:
        full = context_full(len(tokens) + 1, context, longest_context(loaded.model))
        error = as_api_error(full)
        error.param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        raise error
    if asked.limit is not None and most is not None and asked.limit > most:
        raise ApiError(
            400, f"At most {most} tokens an answer, not {asked.limit}.", param="max_tokens"
        )
    sampling = asked.sampling.filled(loaded.model.generation_config)
    if asked.limit is None:
        usual = min(sampling.max_tokens or LONGEST_ANSWER, most or LONGEST_ANSWER)
        sampling = replace(sampling, max_tokens=usual)
    return sampling


def _checked(tokens: list[int], loaded: Loaded) -> list[int]:
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    if any(not 0 <= token < vocabulary for token in tokens):
        raise ApiError(400, f"Tokens are numbers from 0 to {vocabulary - 1}.", param="prompt")
    return tokens


def _client(request: Request, asked: ChatRequest | CompletionRequest) -> str:
    """Whose line a request joins: the user it names, else the address it comes from."""
    where = request.client.host if request.client is not None else ""
    return f"user:{asked.user}" if asked.user else f"address:{where}"


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)
