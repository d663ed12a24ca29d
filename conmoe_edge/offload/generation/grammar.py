"""What an answer has to be: a JSON value of a schema, or text of a grammar. ``llguidance`` says which tokens may come
next; every other one gets no chance.

A ``Grammar`` is compiled once, with limits, on the thread of the caller (a schema comes from a client), and each answer
gets a ``Rule`` of its own from it. Memory: the tokenizer's tokens once more as a tree (``GrammarMaker``; 4 MiB for
4,096 tokens, some 60 MiB for 150,000), made with the first grammar, and a few hundred KiB a grammar.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.prompt import end_tokens

WHITESPACE = "[ ]?"
"""Between the parts of a JSON value: a blank, or nothing. Every value of a schema can be written so, in one line. Where
indentation is allowed (20 blanks a line with llama.cpp) a weak model fills its answer with it, and each blank costs
a token's time."""
LONGEST_SCHEMA = 256 << 10
"""Characters of a schema or a grammar."""
_DEEPEST = 64


class GrammarMaker:
    """Compiles grammars for one tokenizer; for any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]) -> None:
        """Nothing is made yet.

        Args:
            tokenizer: of transformers.
            vocabulary: rows of the model's scores.
            ends: tokens that end an answer; they may come where the grammar is complete.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._lock = threading.Lock()
        self._tokens: Any = None

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any) -> GrammarMaker:
        """For a loaded package and its tokenizer."""
        rows = model.get_input_embeddings().num_embeddings
        return cls(tokenizer, rows, sorted(end_tokens(model, tokenizer)))

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON values of ``schema``, which ``{"type": "object"}`` leaves any object.

        Raises:
            UsageError: the schema is wrong, uses what cannot be enforced, or the tokenizer cannot be used for it.
        """
        return self._made(json_grammar(schema), "JSON schema")

    def lark(self, text: str) -> Grammar:
        """Texts of a grammar in llguidance's dialect of Lark.

        Raises:
            UsageError: as of ``json_schema``.
        """
        return self._made(text, "grammar")

    def _made(self, text: str, what: str) -> Grammar:
        from llguidance import LLMatcher

        tokens = self._token_tree()
        matcher = LLMatcher(tokens, text, log_level=0)
        if matcher.is_error():
            raise UsageError(
                f"The {what} cannot be enforced.",
                _one_line(matcher.get_error()),
                "leave out what is not supported, or ask without it",
            )
        grammar = Grammar(matcher, self._vocabulary, self._ends)
        grammar.rule().allowed(torch.zeros(1, self._vocabulary))  # one that nothing fits ends here
        return grammar

    def _token_tree(self) -> Any:
        with self._lock:
            if self._tokens is None:
                self._tokens = self._make_tree()
            return self._tokens

    def _make_tree(self) -> Any:
        from llguidance import LLTokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(
                "Answers of this model cannot be held to a schema.",
                f"its tokenizer, {type(self._tokenizer).__name__}, has no tokenizer.json",
                "ask without a schema and without required tools",
            )
        described = json.loads(backend.to_str())
        described["truncation"] = described["padding"] = None
        size = max(self._vocabulary, len(self._tokenizer))
        try:
            return LLTokenizer(
                json.dumps(described, ensure_ascii=False), n_vocab=size, eos_token=self._ends
            )
        except ValueError as error:
            raise UsageError(
                "Answers of this model cannot be held to a schema.",
                f"its tokenizer is of a kind that llguidance does not take: {_one_line(str(error))}",
                "ask without a schema and without required tools",
            ) from error


class Grammar:
    """A compiled grammar; what ``SamplingSettings`` hold."""

    def __init__(self, matcher: Any, vocabulary: int, ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ends = frozenset(ends)

    def rule(self) -> Rule:
        """It, from its beginning, for one answer."""
        return Rule(self._matcher.deep_copy(), self._vocabulary, self._ends)


class Rule:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ends = ends

    def allowed(self, scores: Tensor, besides: int | None = None) -> Tensor:
        """``scores`` [1, V] with minus infinity for every token that may not come next; ``besides`` may too.

        Raises:
            UsageError: none may, because nothing fits the grammar, or it became too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        may = np.zeros(scores.shape[-1], dtype=bool)
        unpacked = np.unpackbits(bits, bitorder="little")[: len(may)].astype(bool)
        may[: len(unpacked)] = unpacked
        if besides is not None:
            may[besides] = True
        if self._matcher.is_error() or not may.any():
            raise UsageError(
                "The answer cannot go on in its grammar.",
                _one_line(self._matcher.get_error()) or "no token of the model may come next",
                "a simpler schema",
            )
        return scores.masked_fill(~torch.from_numpy(may).to(scores.device)[None], -torch.inf)

    def unended(self, scores: Tensor) -> Tensor:
        """``scores`` [1, V] with minus infinity for the tokens that end an answer: before the grammar's text has begun
        none may."""
        ends = [end for end in self._ends if end < scores.shape[-1]]
        return scores.index_fill(-1, torch.tensor(ends, device=scores.device), -torch.inf)

    def took(self, token: int) -> None:
        """The answer goes on with ``token``."""
        if token not in self._ends and not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def json_grammar(schema: Mapping[str, Any] | bool) -> str:
    """The grammar of a JSON schema, as llguidance takes it.

    Raises:
        UsageError: it is no schema, or too large.
    """
    return _schema_text(schema, wrap=True)


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """The same, to stand in a Lark grammar: ``%json {...}``."""
    return f"%json {_schema_text(schema, wrap=False)}"


def _schema_text(schema: Any, *, wrap: bool) -> str:
    from llguidance import LLMatcher

    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise UsageError("A JSON schema is an object.", "", '{"type": "object"}, say')
    _check_depth(schema)
    # What a schema says of itself to llguidance would change how it is read.
    plain = {key: value for key, value in schema.items() if key != "x-guidance"}
    options = {"whitespace_pattern": WHITESPACE}
    text = json.dumps({**plain, "x-guidance": options}, ensure_ascii=False)
    if len(text) > LONGEST_SCHEMA:
        raise UsageError(
            "The JSON schema is too long.", f"{len(text):,} characters", "a shorter one"
        )
    return LLMatcher.grammar_from_json_schema(text) if wrap else text


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise UsageError(
                "The JSON schema is nested too deeply.",
                f"over {_DEEPEST} levels",
                f"a schema of at most {_DEEPEST} levels; parts of it can be named under $defs",
            )
        inner = (one.values() if isinstance(one, Mapping) else one for one in level)
        level = [x for group in inner for x in group if isinstance(x, (Mapping, list))]


def _one_line(text: str) -> str:
    """Without what llguidance tells of its state."""
    return " ".join(text.partition("<state>")[0].split())[:300]
