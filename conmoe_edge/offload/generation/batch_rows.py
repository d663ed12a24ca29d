"""``generate`` with a batch: its rows are answers that share steps, each with the bits that it has alone.

transformers computes a batch padded to one length, which gives every row sums of the batch's shape. Here ``generate``
gets a cache of its own class, ``RowsCache``, where it was asked for a batch. A forward that comes with one takes each
row's prompt through the model without its padding, in the package's chunks, and the next tokens of all rows in steps
that they share (``shared_steps.py``). All else is transformers': padding, processors, drawing, stopping, what it gives.

A row that an end mark has ended is computed no further: transformers pads it and looks at none of its scores.

transformers' way go, with a warning that says why: beam search and other modes than one token after the other, caches
that the caller brings or asks for, prompts as embeddings, masks with holes, positions of the caller's own and calls for
more than scores. Where a layer is not one call of the operator (``FastPathReport.apart``),
``generate`` is left alone.

Memory: the caches of all rows, which together hold no more tokens than the batch would with its padding; activations of
one chunk; scores [B, V].
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from conmoe_edge.compat import CACHE_ARGUMENTS, Arguments, cache_of
from conmoe_edge.errors import UsageError
from conmoe_edge.offload.fastpath.kv_cache import StandsForOthers, grow_in_steps
from conmoe_edge.offload.fastpath.packed_cache import pack_in_steps
from conmoe_edge.offload.fastpath.report import warn_once
from conmoe_edge.offload.fastpath.together import Together
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.generation.shared_steps import (
    MOST_TOGETHER,
    is_next_single,
    may_share,
    shared_scores,
)
from conmoe_edge.offload.runtime import Runtime

_OTHER_MODES = {
    "num_beams": "beam search",
    "penalty_alpha": "contrastive search",
    "dola_layers": "decoding by layers",
    "constraints": "constrained search",
    "force_words_ids": "constrained search",
    "prompt_lookup_num_tokens": "assisted generation",
    "assistant_early_exit": "assisted generation",
    "use_mtp": "assisted generation",
    "is_assistant": "assisted generation",
    "cache_implementation": "a cache of another kind",
    "prefill_chunk_size": "a prompt in pieces of the caller's length",
    "output_attentions": "attentions",
    "output_hidden_states": "hidden states",
}
"""Settings of ``generate`` that ask for more than a token after the other of each row, and what they ask for."""
_OTHER_ARGUMENTS = {
    **dict.fromkeys(CACHE_ARGUMENTS, "a cache of the caller's"),
    "assistant_model": "assisted generation",
    "custom_generate": "a loop of the caller's",
    "inputs_embeds": "embeddings",
}
_SAYS_NOTHING = ("use_cache", "return_dict")
"""Arguments of a forward that may be true: what they ask for is given anyway."""
_LOOKED_AT = (*CACHE_ARGUMENTS, "input_ids", "attention_mask", "position_ids", "logits_to_keep")


class RowsCache(StandsForOthers):
    """Stands for the caches of a batch's rows while one ``generate`` runs; it has no keys and values itself."""

    def __init__(self, config: Any, ends: frozenset[int]) -> None:
        """``ends``: tokens behind which the scores of a row are asked for, but not looked at."""
        super().__init__(config=config)
        self.ends = ends
        self.rows: list[_Row] = []
        self.length = 0  # tokens of a row with its padding
        self.over = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a row, its padding included."""
        return self.length

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            "The cache of a batch holds an answer for each of its rows, and ends with them.",
            "it has no keys and values of one shape that could be cut, copied or gone on with",
            "give generate a DynamicCache of your own, which goes transformers' way",
        )

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


@dataclass(slots=True)
class _Row:
    """An answer of a batch, as ``shared_scores`` takes it; ``cached`` is ``None`` once an end mark has ended it."""

    cached: CachedTokens | None
    tokens: list[int]
    prompt_length: int


def take_batches(model: Any) -> None:
    """Let the rows of a batch that ``generate`` is asked for share their steps, where the answers of ``model`` may.

    Raises:
        UnsupportedModel: the arguments of the model's ``forward`` are not known.
    """
    together = may_share(model.conmoe)
    if together is None or not hasattr(model, "generate"):
        return
    batches = _Batches(model, together)
    model.forward = batches.forward_of(model)
    model.generate = batches.generate_of(model)


class _Batches:
    """What stands in front of a model's ``forward`` and ``generate``."""

    def __init__(self, model: Any, together: Together) -> None:
        self._runtime: Runtime = model.conmoe
        self._together = together
        self._arguments = Arguments.of(model)

    def generate_of(self, model: Any) -> Callable[..., Any]:
        """``generate`` that brings a ``RowsCache`` where it is asked for a batch."""
        whole = model.generate
        signature = inspect.signature(whole)

        @functools.wraps(whole)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(*args, **kwargs).arguments
            given = {**{k: v for k, v in given.items() if k != "kwargs"}, **kwargs}
            cache = self._cache_for(model, given)
            if cache is None:
                return whole(*args, **kwargs)
            try:
                return whole(*args, **{**kwargs, self._arguments.cache: cache})
            finally:
                cache.over = True
                cache.rows = []

        return generate

    def _cache_for(self, model: Any, given: Mapping[str, Any]) -> RowsCache | None:
        """What ``generate`` with the arguments ``given`` gets; ``None`` where it goes transformers' way."""
        settings = _settings(model, given)
        prompts = given.get("inputs")
        if prompts is None:
            prompts = given.get("input_ids")
        if not isinstance(prompts, Tensor) or prompts.dim() != 2 or not prompts.shape[1]:
            return None
        if prompts.shape[0] * (settings("num_return_sequences") or 1) < 2:
            return None
        if settings("use_cache") is False:
            return None
        why = _other_way(settings, given)
        if why:
            _warn(why)
            return None
        config = model.config.get_text_config(decoder=True)
        shown = settings("output_scores") or settings("output_logits")
        return RowsCache(config, frozenset() if shown else _ends(settings("eos_token_id")))

    def forward_of(self, model: Any) -> Callable[..., Any]:
        """``forward`` that takes the rows of a ``RowsCache`` through the model."""
        whole = model.forward

        @functools.wraps(whole)
        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = cache_of(kwargs)
            if not isinstance(cache, RowsCache):
                return whole(*args, **kwargs)
            named = self._arguments.named(args, kwargs)
            ids: Tensor = named["input_ids"]
            if cache.over:
                cache._refuse()
            if not cache.rows:
                prompts = _prompts(named)
                if prompts is None:
                    _warn("padding that is not on the left alone, or more than scores")
                    own = DynamicCache(config=model.config.get_text_config(decoder=True))
                    return model(**{**named, self._arguments.cache: own})
                cache.rows = [self._begin(model, tokens, len(prompts)) for tokens in prompts]
            elif ids.shape == (len(cache.rows), 1):
                _add(cache, ids[:, 0].tolist())
            else:
                cache._refuse()
            scores = self._scores(model, cache.rows)
            cache.length += ids.shape[1]
            return CausalLMOutputWithPast(**{"logits": scores, self._arguments.cache: cache})

        return forward

    def _begin(self, model: Any, tokens: list[int], rows: int) -> _Row:
        """A row before its first forward. Its buffers keep room ahead within its share of the context only."""
        config, limit = model.config.get_text_config(decoder=True), self._runtime.context // rows
        in_steps = grow_in_steps if self._runtime.kv_precision == "source" else pack_in_steps

        def empty() -> DynamicCache:
            cache = DynamicCache(config=config)
            in_steps(cache, limit)
            return cache

        chunk = max(1, min(self._runtime.prefill_chunk, self._runtime.context))
        cached = CachedTokens(model, chunk, empty=empty)
        cached.wants_end = lambda index: False  # nobody comes back to them
        return _Row(cached, tokens, len(tokens))

    def _scores(self, model: Any, rows: Sequence[_Row]) -> Tensor:
        """[B, 1, V]: what follows each row; zeros where nobody looks at it."""
        going = [number for number, row in enumerate(rows) if row.cached is not None]
        found: dict[int, Tensor] = {}
        single = [number for number in going if is_next_single(rows[number])]
        for start in range(0, len(single), MOST_TOGETHER):
            some = single[start : start + MOST_TOGETHER]
            shared = None
            if len(some) > 1:
                shared = shared_scores(self._together, [rows[number] for number in some])
            if shared is not None:
                found.update(zip(some, shared, strict=True))
        for number in going:
            if number not in found:
                found[number] = _alone(rows[number])
        like = next(iter(found.values()), None)
        if like is None:  # all are over, and a criterion of the caller's wants to see one more
            return torch.zeros(len(rows), 1, model.config.get_text_config().vocab_size)
        scores = like.new_zeros((len(rows), 1, like.shape[-1]))
        for number, row in found.items():
            scores[number] = row
        return scores


def _warn(why: str) -> None:
    warn_once(f"generate with a batch goes transformers' way, which is slower: {why}")


def _alone(row: _Row) -> Tensor:
    """[1, V]: what follows ``row``, in forwards of its own."""
    assert row.cached is not None, "it goes on"
    scores = None
    while scores is None:
        scores = row.cached.step(row.tokens, row.prompt_length)
    return scores


def _add(cache: RowsCache, tokens: Sequence[int]) -> None:
    """The tokens that were drawn, one for each row."""
    for row, token in zip(cache.rows, tokens, strict=True):
        if token in cache.ends:
            row.cached = None
        elif row.cached is not None:
            row.tokens.append(token)


def _prompts(named: Mapping[str, Any]) -> list[list[int]] | None:
    """The rows of a batch's first forward without their padding; ``None`` where it is not padding on the left alone,
    or more than the scores of the last tokens is asked for.
    """
    for name, value in named.items():
        if name in _LOOKED_AT or value is None or value is False:
            continue
        if name not in _SAYS_NOTHING or value is not True:
            return None
    ids, mask, places = (named.get(k) for k in ("input_ids", "attention_mask", "position_ids"))
    if ids is None or named.get("use_cache") is False or named.get("return_dict") is False:
        return None
    keep = named.get("logits_to_keep", 1)
    if not isinstance(keep, int) or keep != 1:
        return None
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape or not bool(mask[:, -1].all()):
        return None
    mask = mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):  # a hole
        return None
    counted = mask.long().cumsum(-1) - 1
    if places is None:
        if not bool(mask.all()):
            return None
    elif places.dim() != 2 or not torch.equal(places.expand_as(ids)[mask], counted[mask]):
        return None
    return [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)]


def _settings(model: Any, given: Mapping[str, Any]) -> Callable[[str], Any]:
    """What ``generate`` takes for a setting: the caller's, else its config's, else the model's."""
    config: GenerationConfig | None = given.get("generation_config")

    def setting(name: str) -> Any:
        if name in given:
            return given[name]
        own = getattr(config, name, None)
        return getattr(model.generation_config, name, None) if own is None else own

    return setting


def _other_way(settings: Callable[[str], Any], given: Mapping[str, Any]) -> str:
    """What ``generate`` is asked for that is no token after the other of each row; empty where it is that."""
    for name, said in _OTHER_MODES.items():
        value = settings(name)
        if value and not (name == "num_beams" and value == 1):
            return said
    return next(
        (said for name, said in _OTHER_ARGUMENTS.items() if given.get(name) is not None), ""
    )


def _ends(eos: Any) -> frozenset[int]:
    """The end marks among the settings of ``generate``: none, a token, or several."""
    if eos is None:
        return frozenset()
    return frozenset(torch.as_tensor(eos, dtype=torch.long).flatten().tolist())
