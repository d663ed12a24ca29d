"""From a request's body to what the engine is to answer: checked, in tokens, within the limits.

The texts of a request live here alone; what waits for its turn has its tokens.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request

from conmoe_edge.offload.generation.answer_form import AnswerForm
from conmoe_edge.offload.generation.answer_parts import PartReader, PlainReader
from conmoe_edge.offload.generation.chat_prompt import ChatPrompt, chat_prompt
from conmoe_edge.offload.generation.context_limit import context_full, longest_context
from conmoe_edge.offload.generation.prompt import SYSTEM_ROLES, text_tokens
from conmoe_edge.offload.generation.sampling_settings import LONGEST_ANSWER, SamplingSettings
from conmoe_edge.serve.answer_rules import answer_rule
from conmoe_edge.serve.answering import Asked
from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.clients import ClientLeft, client_of, unless_left
from conmoe_edge.serve.engine import Engine
from conmoe_edge.serve.guard import body_of, entry_of
from conmoe_edge.serve.http_errors import ApiError, as_api_error
from conmoe_edge.serve.jobs import Loaded
from conmoe_edge.serve.requests import (
    MOST_VALUES,
    ChatRequest,
    CompletionRequest,
    check_request,
    read_json,
)
from conmoe_edge.serve.settings import Settings
from conmoe_edge.serve.token_bytes import TokenBytes
from conmoe_edge.serve.tokenising import Tokenising, Tokens

R = TypeVar("R", ChatRequest, CompletionRequest)
T = TypeVar("T")
Translate = Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]]
"""Another API's request in OpenAI's form, and the names of what was left out of it."""
_LARGEST_SEED = 1 << 63


class Asking:
    """Reads requests for one engine."""

    def __init__(self, engine: Engine, settings: Settings, tokenising: Tokenising) -> None:
        self._engine = engine
        self._settings = settings
        self._tokenising = tokenising
        self._special = settings.allow_special_tokens
        self._bytes: TokenBytes | None = None

    def check_name(self, name: str | None, *, strict: bool) -> None:
        """A model's name is this one's, or, unless ``strict``, any.

        Raises:
            ApiError: it is another one's.
        """
        if name not in (self._settings.name, *self._settings.aliases) and strict:
            raise ApiError(
                404,
                f"The model {(name or '')[:100]!r} is not here; this server has {self._settings.name!r}.",
                param="model",
                code="model_not_found",
            )

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token."""
        if self._bytes is None:
            self._bytes = TokenBytes(self._ready().tokenizer)
        return self._bytes.of(token)

    async def chat(
        self, request: Request, translate: Translate | None = None
    ) -> tuple[ChatRequest, Asked]:
        """A conversation; ``translate`` makes OpenAI's form of another one's body."""
        asked = self._read(request, ChatRequest, translate)
        loaded = self._ready()
        messages = [message.plain() for message in asked.messages]
        template = getattr(loaded.tokenizer, "chat_template", None)
        before = bool(messages) and messages[0].get("role") in SYSTEM_ROLES
        if len(messages) > 1 + before and not template:
            # It was trained on no form of a conversation, and any that were made up here would be answered worse.
            raise ApiError(
                400,
                "This model has no chat template: send one message, with a system message before it if need be, or use "
                "/v1/completions.",
                param="messages",
            )
        tools = _tools(asked)
        check = self._check_length("messages")
        made: list[tuple[AnswerForm, SamplingSettings, bool]] = []

        def make() -> list[int]:
            found: ChatPrompt = chat_prompt(
                loaded.tokenizer,
                messages,
                tools=tools,
                template_kwargs=_template_kwargs(asked),
                allow_special_tokens=self._special,
                check=check,
            )
            rule = answer_rule(asked, found.form, tools, loaded)
            made.append((found.form, rule, found.reordered))
            return found.tokens

        texts = _texts([messages, tools])
        tokens = await self._tokens(request, asked, texts, make, asked.n or 1)
        form, sampling, reordered = made[0]
        ignored = (*asked.ignored, *_without_effect(asked, form))
        wanted = asked.model_copy(update={"messages": (), "tools": None, "ignored": ignored})
        asked_for = self._asked(request, wanted, [tokens], sampling, lambda: form.reader(tools))
        if reordered:
            said = {**asked_for.headers, "X-Conmoe-Changed": "messages"}
            asked_for = replace(asked_for, headers=said)
        return wanted, asked_for

    async def completion(self, request: Request) -> tuple[CompletionRequest, Asked, Sequence[str]]:
        """Prompts as text or as tokens, and the texts that answers begin with."""
        asked = self._read(request, CompletionRequest)
        loaded, prompts = self._ready(), asked.prompts
        answers = len(prompts) * (asked.n or 1)
        self._check_answers(answers, "prompt")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        lengths: list[int] = []

        def make() -> list[int]:
            found: list[int] = []
            for prompt in prompts:
                if isinstance(prompt, str):
                    special = self._special
                    one = text_tokens(loaded.tokenizer, prompt, allow_special_tokens=special)
                else:
                    one = list(prompt)
                lengths.append(len(one))
                found += one
            return found

        check = self._check_length("prompt")
        for prompt in prompts:
            check(prompt) if isinstance(prompt, str) else _check_tokens(prompt, loaded)
        tokens = await self._tokens(request, asked, texts, make, answers)
        if not all(lengths):
            raise ApiError(400, "The prompt is empty.", param="prompt")
        each = _split(tokens, lengths)
        echoes = [
            prompt if isinstance(prompt, str) else loaded.tokenizer.decode(prompt)
            for prompt in (prompts if asked.echo else ())
        ]
        wanted = asked.model_copy(update={"prompt": ""})
        return wanted, self._asked(request, wanted, each, asked.sampling, PlainReader), echoes

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """``{"content": TEXT}``, or ``prompt``, or ``messages``: the tokens."""
        value = read_json(body_of(request.scope), MOST_VALUES + self._engine.context)
        loaded = self._ready()
        if "messages" in value:
            check = self._check_length("messages")
            named = {"model": value.get("model"), "messages": value["messages"]}
            asked = check_request(named, ChatRequest, self._settings.limits.messages)
            messages = [message.plain() for message in asked.messages]
            texts = _texts(messages)

            def make() -> list[int]:
                special = self._special
                return chat_prompt(
                    loaded.tokenizer, messages, allow_special_tokens=special, check=check
                ).tokens
        else:
            text = value.get("content", value.get("prompt"))
            if not isinstance(text, str):
                raise ApiError(400, "content: a text, or messages.", param="content")
            self._check_length("content")(text)
            texts = [text]

            def make() -> list[int]:
                return text_tokens(loaded.tokenizer, text, allow_special_tokens=self._special)

        tokens = list(await self._tokens(request, None, texts, make))
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self._engine.context}

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """``{"tokens": [...]}``: the text, control tokens included."""
        value = read_json(body_of(request.scope), MOST_VALUES + self._engine.context)
        loaded, tokens = self._ready(), value.get("tokens")
        if not isinstance(tokens, list) or not all(type(one) is int for one in tokens):
            raise ApiError(400, "tokens: a list of numbers.", param="tokens")
        _check_tokens(tokens, loaded, "tokens")
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=False)
        return {"content": text, "prompt": text}

    def _asked(
        self,
        request: Request,
        wanted: ChatRequest | CompletionRequest,
        prompts: Sequence[Tokens],
        sampling: SamplingSettings,
        reader: Callable[[], PartReader],
    ) -> Asked:
        count = wanted.n or 1
        each: list[SamplingSettings] = []
        for tokens in prompts:
            settings = self._sampling(wanted, sampling, tokens)
            each += [_with_seed(settings, number) for number in range(count)]
        return Asked(
            [tokens for tokens in prompts for _ in range(count)],
            each,
            client_of(request, wanted.user),
            reader,
            bool(wanted.stream),
            self._headers(wanted),
        )

    def _headers(self, wanted: ChatRequest | CompletionRequest) -> Mapping[str, str]:
        """What was taken otherwise than it was asked."""
        said = {}
        if wanted.ignored:
            said["X-Conmoe-Ignored"] = _header(", ".join(wanted.ignored))
        name = wanted.model
        if name is not None and name not in (self._settings.name, *self._settings.aliases):
            said["X-Conmoe-Model"] = _header(f"{self._settings.name} (not {name})")
        return said

    def _ready(self) -> Loaded:
        state = self._engine.snapshot.state
        if state != "ready" or self._engine.loaded is None:
            raise as_api_error(Busy("loading" if state == "loading" else "stopping", 5))
        return self._engine.loaded

    def _read(
        self,
        request: Request,
        kind: type[R],
        translate: Translate | None = None,
    ) -> R:
        """The request, of a body that is let go of."""
        strict = self._settings.strict
        value = read_json(body_of(request.scope), MOST_VALUES + self._engine.context)
        left_out: list[str] = []
        if translate is not None:
            value, left_out = translate(value)
        if strict and left_out:
            raise ApiError(
                400, f"{left_out[0]} is not supported.", param=left_out[0].partition(" ")[0]
            )
        asked = check_request(value, kind, self._settings.limits.messages, strict=strict)
        self.check_name(asked.model, strict=strict)
        return asked.model_copy(update={"ignored": (*asked.ignored, *left_out)})

    def _check_answers(self, answers: int, param: str) -> None:
        most = self._settings.limits.answers
        if answers > most:
            raise ApiError(
                400, f"At most {most} answers to one request here, not {answers}.", param=param
            )

    def _check_length(self, param: str) -> Callable[[str], None]:
        """Refuses a text that cannot fit, or that this budget cannot tokenise."""
        loaded, context, sizes = self._ready(), self._engine.context, self._engine.sizes

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
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest | None,
        texts: Sequence[str],
        make: Callable[[], list[int]],
        answers: int = 1,
    ) -> Tokens:
        """The tokens that ``make`` finds in ``texts``, when it is the client's turn."""
        entry = entry_of(request.scope)
        client = client_of(request, None if asked is None else asked.user)
        nbytes = sum(map(sys.getsizeof, texts))
        entry.hold(nbytes)
        self._check_answers(answers, "n")
        entry.enter(client, answers)

        def compact() -> Tokens:
            return array("i", make())

        if not texts:
            tokens = compact()
        else:
            making = asyncio.ensure_future(self._tokenising.tokens(client, compact, nbytes))
            entry.on_withdraw(making.cancel)
            try:
                tokens = await unless_left(request, making)
            except ClientLeft:
                raise
            except (
                Exception
            ) as error:  # of the tokenizer or the template: its own, or a mistake of the client
                raise as_api_error(error) from error
        entry.on_withdraw(lambda: False)
        entry.hold(tokens.itemsize * len(tokens))
        return tokens

    def _sampling(
        self,
        asked: ChatRequest | CompletionRequest,
        sampling: SamplingSettings,
        tokens: Sequence[int],
    ) -> SamplingSettings:
        """How the engine is to answer ``tokens``, within the limits.

        Raises:
            ApiError: the prompt leaves no room for an answer, or the answer may not be that long.
        """
        loaded = self._ready()
        context, most = self._engine.context, self._settings.limits.max_tokens
        if len(tokens) > context:
            param = "messages" if isinstance(asked, ChatRequest) else "prompt"
            raise _too_long(len(tokens) + 1, context, loaded, param)
        if asked.limit is not None and most is not None and asked.limit > most:
            raise ApiError(
                400, f"At most {most} tokens an answer, not {asked.limit}.", param="max_tokens"
            )
        _check_tokens([token for token, _ in sampling.logit_bias], loaded, "logit_bias")
        sampling = sampling.filled(loaded.model.generation_config)
        if asked.limit is None:
            usual = min(sampling.max_tokens or LONGEST_ANSWER, most or LONGEST_ANSWER)
            sampling = replace(sampling, max_tokens=usual)
        return sampling


def _tools(asked: ChatRequest) -> list[dict[str, Any]]:
    """The tools that may be called, as templates take them."""
    if asked.tool_choice == "none":
        return []
    return [tool.plain() for tool in asked.tools or ()]


def _template_kwargs(asked: ChatRequest) -> dict[str, Any]:
    """What the chat template sees besides: the client's own words, and how much it wants to be thought."""
    given: dict[str, Any] = {}
    if asked.reasoning_effort is not None:
        given["reasoning_effort"] = asked.reasoning_effort
        given["enable_thinking"] = asked.reasoning_effort != "none"
    return {**given, **(asked.chat_template_kwargs or {})}


def _without_effect(asked: ChatRequest, form: AnswerForm) -> list[str]:
    """Wishes about reasoning that this model's template has no words for, or whose marks nobody can count."""
    found = []
    words = ("reasoning_effort", "enable_thinking")
    if asked.reasoning_effort is not None and not any(one in form.template for one in words):
        found.append("reasoning_effort")
    if asked.thinking_budget is not None and form.thinking is None:
        found.append("thinking_budget")
    return found


def _texts(value: Any) -> list[str]:
    """All strings in a JSON value."""
    found, left = [], [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += one
    return found


def _split(tokens: Tokens, lengths: Sequence[int]) -> list[Tokens]:
    found, start = [], 0
    for length in lengths:
        found.append(tokens[start : start + length])
        start += length
    return found


def _with_seed(settings: SamplingSettings, number: int) -> SamplingSettings:
    """Answers to one question differ, and repeat: each has a seed of its own."""
    if settings.seed is None or number == 0:
        return settings
    seed = settings.seed + number
    return replace(settings, seed=seed if seed < _LARGEST_SEED else seed - 2 * _LARGEST_SEED)


def _header(text: str) -> str:
    """What may stand in a header."""
    return "".join(one if 0x20 <= ord(one) < 0x7F else "?" for one in text)[:500]


def _too_long(needed: int, context: int, loaded: Loaded, param: str, bound: str = "") -> ApiError:
    """A prompt that leaves no room for an answer; ``bound`` where ``needed`` is only that."""
    error = as_api_error(context_full(needed, context, longest_context(loaded.model)))
    error.param = param
    if bound:
        error.message = error.message.replace("needs ", f"needs {bound}", 1)
    return error


def _check_tokens(tokens: Sequence[int], loaded: Loaded, param: str = "prompt") -> None:
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    if any(not 0 <= token < vocabulary for token in tokens):
        raise ApiError(400, f"Tokens are numbers from 0 to {vocabulary - 1}.", param=param)
