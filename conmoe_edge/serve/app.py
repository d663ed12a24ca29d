"""The routes: from a checked request to a job of the engine, and its events back to the client.

``GET /`` the page, ``/health``, ``/stats``, ``/metrics``, ``/v1/models``;
``POST /v1/chat/completions``, ``/v1/completions``. Every error leaves as OpenAI's error object. A client
that disconnects cancels its job, wherever it stands.

A request goes through three waits, and is in the account of ``intake.py`` in each: for its tokens, for its turn, and
for its client to read. A text that cannot fit is refused before it is tokenised (``fewest_tokens.py``).
"""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from conmoe_edge.offload.generation.context_limit import context_full, longest_context
from conmoe_edge.offload.generation.prompt import SYSTEM_ROLES, prompt_tokens, text_tokens
from conmoe_edge.offload.generation.sampling_settings import LONGEST_ANSWER, SamplingSettings
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.guard import body_of, entry_of
from conmoe_edge.serve.http_errors import ApiError, as_api_error
from conmoe_edge.serve.intake import Intake
from conmoe_edge.serve.jobs import Busy, Done, Failed, Job, Loaded, Piece
from conmoe_edge.serve.mailbox import Mailbox
from conmoe_edge.serve.page_stats import page_stats
from conmoe_edge.serve.prometheus import CONTENT_TYPE, Metrics
from conmoe_edge.serve.replies import STILL_HERE, Reply, event, model_json, models
from conmoe_edge.serve.requests import MOST_VALUES, ChatRequest, CompletionRequest, read_request
from conmoe_edge.serve.settings import Settings
from conmoe_edge.serve.tokenising import Tokenising, Tokens

T = TypeVar("T")
R = TypeVar("R", ChatRequest, CompletionRequest)
SIGN_OF_LIFE_SECONDS = 15.0
_PAGE = Path(__file__).parent / "page"
_FILES = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}


def make_app(
    engine: Engine, metrics: Metrics, settings: Settings, intake: Intake, tokenising: Tokenising
) -> FastAPI:
    """The application; its guard reads the bodies and opens their entries in ``intake``."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    started = int(time.time())
    special = settings.allow_special_tokens

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return _response(error)

    @app.exception_handler(Busy)
    async def _busy(request: Request, error: Exception) -> Response:
        return _response(as_api_error(error))

    @app.exception_handler(ClientLeft)
    async def _left_early(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

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
        return Response(
            metrics.text(engine.snapshot, settings.name, intake), media_type=CONTENT_TYPE
        )

    @app.get("/stats")
    async def stats() -> Response:
        return JSONResponse(page_stats(engine, metrics, settings, intake))

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse(models(settings.name, started))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        _known(name)
        return JSONResponse(model_json(name, started))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(request, *await _chat_prompt(request), chat=True)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(request, *await _text_prompt(request), chat=False)

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

    # The texts of a request live in these two alone: what waits for its turn has its tokens.

    async def _chat_prompt(request: Request) -> tuple[ChatRequest, Tokens]:
        asked = _read(request, ChatRequest)
        messages = [message.plain() for message in asked.messages]
        loaded = _ready()
        before = bool(messages) and messages[0].get("role") in SYSTEM_ROLES
        if len(messages) > 1 + before and not getattr(loaded.tokenizer, "chat_template", None):
            # It was trained on no form of a conversation, and any that were made up here would be answered worse.
            raise ApiError(
                400,
                "This model has no chat template: send one message, with a system message before it if need be, or use "
                "/v1/completions.",
                param="messages",
            )
        check = _check_length("messages")
        texts = [message["content"] for message in messages]
        tokens = await _tokens(
            request,
            asked,
            texts,
            lambda: prompt_tokens(
                loaded.tokenizer, messages, allow_special_tokens=special, check=check
            ),
        )
        return asked.model_copy(update={"messages": ()}), tokens

    async def _text_prompt(request: Request) -> tuple[CompletionRequest, Tokens]:
        asked = _read(request, CompletionRequest)
        loaded = _ready()
        prompt = asked.prompt
        if isinstance(prompt, list) and not isinstance(prompt[0], str):
            given = _checked([int(token) for token in prompt], loaded)
            tokens = await _tokens(request, asked, [], lambda: given)
        else:
            text = prompt if isinstance(prompt, str) else str(prompt[0])
            _check_length("prompt")(text)
            tokens = await _tokens(
                request,
                asked,
                [text],
                lambda: text_tokens(loaded.tokenizer, text, allow_special_tokens=special),
            )
        if not tokens:
            raise ApiError(400, "The prompt is empty.", param="prompt")
        return asked.model_copy(update={"prompt": ""}), tokens

    def _read(request: Request, kind: type[R]) -> R:
        """The request, of a body that is let go of."""
        values = MOST_VALUES + engine.context
        asked = read_request(body_of(request.scope), kind, settings.limits.messages, values)
        _known(asked.model)
        return asked

    def _check_length(param: str) -> Callable[[str], None]:
        """Refuses a text that cannot fit, or that this budget cannot tokenise."""
        loaded, context, sizes = _ready(), engine.context, engine.sizes

        def check(text: str) -> None:
            fewest = loaded.fewest.of(text)
            if fewest > context:
                raise _too_long(fewest, context, loaded, param, "at least ")
            nbytes = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            if nbytes > sizes.text:
                raise ApiError(
                    413,
                    f"The text has {nbytes:,} bytes; within this server's memory a text of "
                    f"{sizes.text:,} can be taken.",
                    param=param,
                    code="request_too_large",
                )

        return check

    async def _tokens(
        request: Request,
        asked: ChatRequest | CompletionRequest,
        texts: Sequence[str],
        make: Callable[[], list[int]],
    ) -> Tokens:
        """The tokens that ``make`` finds in ``texts``, when it is the client's turn."""
        entry = entry_of(request.scope)
        client = _client(request, asked)
        nbytes = sum(map(sys.getsizeof, texts))
        entry.hold(nbytes)
        entry.enter(client)

        def compact() -> Tokens:
            return array("i", make())

        if not texts:
            tokens = compact()
        else:
            making = asyncio.ensure_future(tokenising.tokens(client, compact, nbytes))
            entry.on_withdraw(making.cancel)
            try:
                tokens = await _unless_left(request, making)
            except ClientLeft:
                raise
            except (
                Exception
            ) as error:  # of the tokenizer or the template: its own, or a mistake of the client
                raise as_api_error(error) from error
        entry.on_withdraw(lambda: False)
        entry.hold(tokens.itemsize * len(tokens))
        return tokens

    async def _answer(
        request: Request,
        asked: ChatRequest | CompletionRequest,
        tokens: Tokens,
        *,
        chat: bool,
    ) -> Response:
        reply = Reply(settings.name, chat, asked.wants_usage)
        events = Mailbox(lambda: engine.cancel(job))
        sampling = _sampling(asked, tokens, engine, settings)
        job = Job(tokens, sampling, _client(request, asked), events.put)
        engine.submit(job)
        entry_of(request.scope).on_withdraw(lambda: engine.withdraw(job))
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


async def _stream(events: Mailbox, reply: Reply) -> AsyncIterator[bytes]:
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
    engine: Engine, job: Job, events: Mailbox, reply: Reply, request: Request
) -> Response:
    """The answer in one piece.

    Raises:
        ClientLeft: the client left before it was there.
    """
    try:
        return await _unless_left(request, asyncio.ensure_future(_collect(events, reply)))
    finally:
        engine.cancel(job)  # nothing happens where it is over


class ClientLeft(Exception):
    """The client left before there was anything to tell it."""


async def _unless_left(request: Request, making: asyncio.Future[T]) -> T:
    """What ``making`` comes to.

    Raises:
        ClientLeft: the client left before that; ``making`` is cancelled.
        Busy: somebody else cancelled it, because there was no room.
    """
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if making.cancelled():
            raise Busy("full")
        if making.done():
            return making.result()
        raise ClientLeft
    finally:
        making.cancel()
        leaving.cancel()


async def _collect(events: Mailbox, reply: Reply) -> Response:
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
    asked: ChatRequest | CompletionRequest,
    tokens: Sequence[int],
    engine: Engine,
    settings: Settings,
) -> SamplingSettings:
    """How the engine is to answer ``tokens``, within the limits.

    Raises:
        ApiError: the prompt leaves no room for an answer, or the answer may not be that long.
    """
    loaded = engine.loaded
    assert loaded is not None, "asked once it is ready"
    context, most = engine.context, settings.limits.max_tokens
    if len(tokens) > context:
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        raise _too_long(len(tokens) + 1, context, loaded, param)
    if asked.limit is not None and most is not None and asked.limit > most:
        raise ApiError(
            400, f"At most {most} tokens an answer, not {asked.limit}.", param="max_tokens"
        )
    sampling = asked.sampling.filled(loaded.model.generation_config)
    if asked.limit is None:
        usual = min(sampling.max_tokens or LONGEST_ANSWER, most or LONGEST_ANSWER)
        sampling = replace(sampling, max_tokens=usual)
    return sampling


def _too_long(needed: int, context: int, loaded: Loaded, param: str, bound: str = "") -> ApiError:
    """A prompt that leaves no room for an answer; ``bound`` where ``needed`` is only that."""
    error = as_api_error(context_full(needed, context, longest_context(loaded.model)))
    error.param = param
    if bound:
        error.message = error.message.replace("needs ", f"needs {bound}", 1)
    return error


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
