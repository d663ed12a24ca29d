"""Attention that transformers has not fused, some queries at a time.

Where a class adds something to its scores that torch's fused attention has no place for (gpt-oss: a sink for every
head), transformers computes all of them: of T tokens behind N others heads * T * (T + N) numbers, and twice that for
what the softmax makes of them. For a chunk of a prompt that is more than all else that the layer holds. Here the
class's own function gets ``QUERIES`` tokens at a time, counted from the first of the forward. What a token gives
depends on its own row of scores alone.

torch multiplies matrices in bf16 at a fraction of the rate of fp32 on a processor without instructions for it (AVX2:
an eighth). There the function gets ``WIDE_FROM`` tokens and more in fp32, the heads of one head of keys at a time, and
its output is rounded once. Fewer go as the class does, and with them every token of an answer.

Memory: three times the scores of ``QUERIES`` tokens, in the model's format (``plan/needs.py`` counts them, and keys and
values for all heads); in fp32 less, for no more than half of the heads are there at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conmoe_edge.compat import native_bf16
from conmoe_edge.model.attention_in_place import EAGER, attend_through

BLOCKED = "conmoe_blocked_eager"
QUERIES = 64
WIDE_FROM = 16
"""Tokens of a forward from which on products are arithmetic, and not the reading of keys and values."""
_MODULES = (
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.mimo_v2_flash.modeling_mimo_v2_flash",
)
"""Of classes whose function is known to take queries and their rows of the mask, and nothing else that has as many; and
of its module what ``_Heads`` has.
"""

_Function = Callable[..., tuple[Tensor, Tensor]]
"""A class's own, with the interface of ``blocked_attention``."""


def blocked(kind: type[PreTrainedModel]) -> bool:
    """Whether models of this class attend so."""
    return kind.__module__ in _MODULES


def attend_in_blocks(model: PreTrainedModel) -> bool:
    """Let ``model`` attend through ``blocked_attention`` where that is made for it; whether it will."""
    return blocked(type(model)) and attend_through(model, BLOCKED, blocked_attention, EAGER)


@dataclass(frozen=True, slots=True)
class _Heads:
    """What the function looks at of its module, for some of the heads."""

    num_key_value_groups: int
    sinks: Tensor | None
    training: bool


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of an attention function: [B, heads, T, D] ... -> ([B, T, heads, D'], none); the weights
    too where all tokens are one block in the model's format.
    """
    whole = sys.modules[type(module).__module__].eager_attention_forward
    tokens = query.shape[2]
    if tokens >= WIDE_FROM and _is_slow(query):
        return _in_fp32(whole, module, (query, key, value), attention_mask, kwargs), None
    if tokens <= QUERIES:
        return whole(module, query, key, value, attention_mask, **kwargs)
    return _in_blocks(whole, module, (query, key, value), attention_mask, kwargs), None


def _is_slow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not native_bf16()


def _in_blocks(
    whole: _Function,
    module: Any,
    rows: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """As of ``blocked_attention``, without weights."""
    query, key, value = rows
    parts = []
    for start in range(0, query.shape[2], QUERIES):
        span = slice(start, start + QUERIES)
        own = None if mask is None else mask[:, :, span]
        parts.append(whole(module, query[:, :, span], key, value, own, **kwargs)[0])
    return torch.cat(parts, dim=1)


def _in_fp32(
    whole: _Function,
    module: Any,
    rows: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """``_in_blocks`` in fp32, for some of the heads at a time."""
    query, key, value = rows
    batch, heads, tokens, _ = query.shape
    groups = key.shape[1]
    each = heads // groups
    step = each if groups > 1 else max(1, each // 2)
    out = query.new_empty(batch, tokens, heads, value.shape[-1])
    for group in range(groups):
        keys, values = (one[:, group : group + 1].float() for one in (key, value))
        for first in range(group * each, (group + 1) * each, step):
            mine = slice(first, min(first + step, (group + 1) * each))
            sinks = None if module.sinks is None else module.sinks[mine]
            part = _Heads(mine.stop - mine.start, sinks, module.training)
            own = mask if mask is None or mask.shape[1] == 1 else mask[:, mine]
            some = query[:, mine].float(), keys, values
            out[:, :, mine] = _in_blocks(whole, part, some, own, kwargs)
    return out
