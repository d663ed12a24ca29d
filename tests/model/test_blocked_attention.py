"""Attention of gpt-oss some queries at a time: the answers of transformers' own function, in less memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.model import blocked_attention as blocks
from conmoe_edge.model.checked_attention import check_attention
from conmoe_edge.model.probe import probe
from tests.families import BY_NAME, tiny_model

SIZES: dict[str, Any] = {"max_position_embeddings": 256}


def logits(model: Any, pieces: list[torch.Tensor]) -> torch.Tensor:
    out, found = None, []
    with torch.no_grad():
        for ids in pieces:
            kept = {} if out is None else cache_argument(model, cache_of(out))
            out = model(ids, use_cache=True, **kept)
            found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", ["gpt_oss", "mimo_v2_flash"])
@pytest.mark.parametrize("lengths", [(200,), (64, 65, 1), (63, 130), (1, 128)])
def test_the_same_scores_with_windows_and_a_cache(name: str, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model: Any = tiny_model(name, dtype=torch.float32, **SIZES)
    ids = torch.randint(3, 90, (1, sum(lengths)))
    pieces = list(ids.split(lengths, dim=1))
    assert model.config._attn_implementation == "eager"
    before = logits(model, pieces)
    assert check_attention(model) and model.config._attn_implementation == blocks.BLOCKED
    assert torch.allclose(logits(model, pieces), before, atol=1e-5, rtol=1e-5)


def test_never_more_queries_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("gpt_oss", dtype=torch.float32, **SIZES)
    assert blocks.attend_in_blocks(model)
    softmax, most = torch.nn.functional.softmax, []

    def seen(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dim() == 4:
            most.append(x.shape[2])
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", seen)
    logits(model, [torch.randint(3, 90, (1, 200))])
    assert set(most) == {blocks.QUERIES, 200 % blocks.QUERIES}


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_plan_knows_whose_scores_are_held(name: str) -> None:
    """Those without a fused attention in transformers; of them, which go by blocks."""
    model: Any = tiny_model(name)
    anatomy = probe(model.config)
    held = not type(model)._supports_sdpa
    assert anatomy.score_heads == (model.config.num_attention_heads if held else 0)
    assert (anatomy.score_rows == blocks.QUERIES) == (name in ("gpt_oss", "mimo_v2_flash"))
    if not held:
        assert not blocks.attend_in_blocks(model)


@dataclass
class Attention(torch.nn.Module):
    """Of gpt_oss, as far as its function looks at it. ``seen``: the queries that the function was called with."""

    heads: int
    groups: int

    def __post_init__(self) -> None:
        super().__init__()
        self.num_key_value_groups = self.heads // self.groups
        self.sinks = torch.nn.Parameter(torch.randn(self.heads).bfloat16())
        self.eval()

    def __hash__(self) -> int:
        return id(self)


Attention.__module__ = "transformers.models.gpt_oss.modeling_gpt_oss"


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (8, 8), (6, 1), (1, 1)])
@pytest.mark.parametrize(("tokens", "cached"), [(16, 0), (70, 130), (200, 3)])
def test_without_bf16_units_the_products_are_in_fp32(
    heads: int, groups: int, tokens: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, width, every = Attention(heads, groups), 16, tokens + cached
    query = torch.randn(2, heads, tokens, width).bfloat16()
    key, value = torch.randn(2, 2, groups, every, width).bfloat16().unbind()
    hidden = torch.ones(tokens, every, dtype=torch.bool).triu(cached + 1)
    mask = torch.zeros(2, 1, tokens, every).masked_fill(hidden, float("-inf"))
    mask[1, :, :, :2] = float("-inf")  # padding
    whole = gpt_oss.eager_attention_forward
    rows = (query.double(), key.double(), value.double())
    exact = whole(module, *rows, mask.double(), scaling=0.25)[0]
    seen: list[torch.Tensor] = []

    def watched(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query)
        return whole(module, query, *args, **kwargs)

    monkeypatch.setattr(gpt_oss, "eager_attention_forward", watched)
    monkeypatch.setattr(blocks, "native_bf16", lambda: False)
    found, _ = blocks.blocked_attention(module, query, key, value, mask.bfloat16(), scaling=0.25)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)  # rounded once
    assert {one.dtype for one in seen} == {torch.float32}
    most = max(one.shape[1] * one.shape[2] for one in seen)
    assert most <= blocks.QUERIES * max(1, heads // 2)
    seen.clear()
    few = query[:, :, -15:]
    blocks.blocked_attention(module, few, key, value, mask[:, :, -15:].bfloat16(), scaling=0.25)
    monkeypatch.setattr(blocks, "native_bf16", lambda: True)
    blocks.blocked_attention(module, query, key, value, mask.bfloat16(), scaling=0.25)
    assert {one.dtype for one in seen} == {torch.bfloat16}
