"""What passes between the routes and the engine: a job in, events back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from conmoe_edge.offload.generation.answer import Answer
from conmoe_edge.offload.generation.grammar import GrammarMaker
from conmoe_edge.offload.generation.prompt_files import PromptFiles
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.token_scores import TokenScore
from conmoe_edge.serve.fewest_tokens import UNKNOWN, FewestTokens

Finish = Literal["stop", "length"]
"""OpenAI's words; an answer that fills the context ends by ``length``."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer; ``cached`` ones of the prompt did not have to be computed, ``reasoning`` ones of the
    answer are its reasoning."""

    prompt: int
    completion: int
    cached: int
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of an answer, and the scores of tokens where they are wanted."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is over; ``stop`` is the stop string that ended it, where one did."""

    finish: Finish
    usage: Usage
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer could not be made."""

    error: BaseException


Event = Piece | Done | Failed


@dataclass(eq=False, slots=True)
class Job:
    """One request.

    Attributes:
        tokens: the prompt.
        settings: how the answer is drawn and where it ends.
        client: whose line it waits in.
        tell: gets the events; called from the engine's thread and must not block.
        arrived: ``time.perf_counter``, as everything the engine times.
        cancelled, started, reserved, answer: the engine's own; ``reserved`` in bytes of cache.
    """

    tokens: Sequence[int]
    settings: SamplingSettings
    client: str
    tell: Callable[[Event], None]
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    started: float = 0.0
    reserved: int = 0
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the engine computes with, how few tokens a text can come to, what is kept over restarts, and what answers
    are held to where that is asked for."""

    model: Any
    tokenizer: Any
    fewest: FewestTokens = UNKNOWN
    files: PromptFiles | None = None
    grammars: GrammarMaker | None = None
