"""A forward of many tokens runs in the chunks in which a chat's prompt does.

``run_in_chunks`` stands in front of a model's ``forward``. Where a call goes over a boundary between two chunks,
counted from the first token in the cache, each chunk becomes a call of its own and their logits are put together. So
``generate`` and the harness of lm-eval get the scores that a chat gets, in the memory that was planned for one chunk.

For a batch of B sequences the chunks are B times shorter, so that as many rows go through. A call without a cache
(``use_cache=False``) gets one for its own time. In one piece, as transformers does it, run

- calls with a cache that is not transformers' general one: models with a class of their own (MiniMax), static caches;
- calls for more than scores (``labels``, hidden states, attentions), or with arguments that are not known here: those
  take the memory that they take.

Memory: the cache, the activations of one chunk, and the logits that were asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from conmoe_edge.compat import CACHE_ARGUMENTS, Arguments, cache_of
from conmoe_edge.offload.generation.context_limit import held_tokens
from conmoe_edge.offload.generation.sequence import is_plain

_SLICED = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "attention_mask")
_PLAIN = ("use_cache", "return_dict", "logits_to_keep")


def run_in_chunks(model: nn.Module, chunk: Callable[[], int]) -> None:
    """Let every ``forward`` of ``model`` that goes over a boundary run chunk by chunk, of ``chunk()`` tokens.

    Raises:
        UnsupportedModel: the arguments of the model's ``forward`` are not known.
    """
    arguments = Arguments.of(model)
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        named = arguments.named(args, kwargs)
        pieces = _pieces(named, arguments, chunk())
        out = None if pieces is None else _in_pieces(model, named, arguments, pieces)
        return whole(*args, **kwargs) if out is None else out

    model.forward = forward


def _pieces(
    named: dict[str, Any], arguments: Arguments, chunk: int
) -> list[tuple[int, int]] | None:
    """First and last token of each piece, counted in the call; ``None`` where it runs in one."""
    tokens = named.get("input_ids")
    if tokens is None:
        tokens = named.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or tokens.shape[1] < 2:
        return None
    rows, count = tokens.shape[:2]
    cache = cache_of(named)
    held = 0 if cache is None else held_tokens(cache)
    chunk = max(1, chunk // max(1, rows))
    if held // chunk == (held + count - 1) // chunk or not _understood(named, held, count):
        return None
    edges = [0, *range(chunk - held % chunk, count, chunk), count]
    return list(pairwise(edges))


def _understood(named: dict[str, Any], held: int, count: int) -> bool:
    """Whether all that a call gives can be given piece by piece."""
    cache = cache_of(named)
    if cache is not None and not is_plain(cache):
        return False
    known = {*_SLICED, *_PLAIN, *CACHE_ARGUMENTS}
    if any(
        value is not None and value is not False
        for name, value in named.items()
        if name not in known
    ):
        return False
    if not isinstance(named.get("logits_to_keep", 0), int):
        return False
    mask = named.get("attention_mask")
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.dim() in (2, 4) and mask.shape[-1] == held + count
    ):
        return False
    places = (named.get("position_ids"), named.get("cache_position"))
    return all(one is None or one.shape[-1] == count for one in places)


def _in_pieces(
    model: Any, named: dict[str, Any], arguments: Arguments, pieces: list[tuple[int, int]]
) -> Any:
    """What the whole call gives; ``None`` where the model turns out to have a cache class of its own."""
    count = pieces[-1][1]
    cache = cache_of(named)
    before = 0 if cache is None else held_tokens(cache)
    keeps = named.get("use_cache") is not False
    wanted = count
    if "logits_to_keep" in arguments.positional:
        wanted = named.get("logits_to_keep") or count
    mask = named.get("attention_mask")
    if mask is not None and mask.dim() == 2 and bool(mask.all()):
        # It hides nothing. Models with positions in three axes count them from the whole mask, not from the piece's.
        named = {name: value for name, value in named.items() if name != "attention_mask"}
    scores: Tensor | None = None
    filled = 0
    out: Any = None
    for start, end in pieces:
        given: dict[str, Any] = {
            name: _cut(name, named[name], start, end, before)
            for name in _SLICED
            if named.get(name) is not None
        }
        if "logits_to_keep" in arguments.positional:
            given["logits_to_keep"] = max(1, min(end - start, wanted - (count - end)))
        given[arguments.cache] = cache
        out = model(**given, use_cache=True, return_dict=True)
        cache = cache_of(out)
        if start == 0 and not is_plain(cache):
            return None
        if end > count - wanted:
            if scores is None:  # one tensor for all, so that no copy of them is needed in the end
                shape = out.logits.shape
                scores = out.logits.new_empty((shape[0], min(wanted, count), *shape[2:]))
            assert scores is not None
            new = out.logits.shape[1]
            scores[:, filled : filled + new] = out.logits
            filled += new
    values = {name: value for name, value in out.items() if keeps or value is not cache}
    values["logits"] = scores
    out = type(out)(**values)
    given_dict = named.get("return_dict")
    as_dict = model.config.return_dict if given_dict is None else given_dict
    return out if as_dict else out.to_tuple()


def _cut(name: str, value: Tensor, start: int, end: int, before: int) -> Tensor:
    """The part of an argument that belongs to the tokens from ``start`` to ``end`` of a call."""
    if name in ("input_ids", "inputs_embeds"):
        return value[:, start:end]
    if name != "attention_mask":
        return value[..., start:end]
    if value.dim() == 2:
        return value[:, : before + end]
    return value[:, :, start:end, : before + end]
