"""Attention of gpt-oss some queries at a time: the answers of transformers' own function, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("lengths", [(200,), (64, 65, 1), (63, 130), (1, 128)])
def test_the_same_scores_with_windows_and_a_cache(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model: Any = tiny_model("gpt_oss", dtype=torch.float32, **SIZES)
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
    assert (anatomy.score_rows == blocks.QUERIES) == (name == "gpt_oss")
    if not held:
        assert not blocks.attend_in_blocks(model)
