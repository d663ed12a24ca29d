"""What a layer's experts are to add up to, from two streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conmoe_edge.compress.stats.layer_tokens import LayerTokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_wanted_is_the_way_between_the_streams(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    target, start = (torch.randn(50, 8, generator=generator).to(dtype) for _ in range(2))
    slots, gates = torch.zeros(50, 2, dtype=torch.int64), torch.rand(50, 2, generator=generator)
    weights = torch.rand(50, generator=generator)
    before = target.clone(), start.clone()
    tokens = LayerTokens(start, slots, gates, target=target, start=start, weights=weights)
    apart = target.float() - start.float()
    assert torch.equal(tokens.wanted(), apart)
    weighted = tokens.weighted()
    assert torch.equal(weighted.wanted(), apart * weights.unsqueeze(1))
    assert torch.equal(weighted.gates, gates * weights.unsqueeze(1))
    rows = torch.arange(0, 50, 7)
    assert torch.equal(weighted.rows(rows).wanted(), weighted.wanted()[rows])
    plain = replace(tokens, start=None)
    plain.wanted().zero_()
    assert torch.equal(plain.wanted(), target.float())
    assert torch.equal(target, before[0]) and torch.equal(start, before[1]), "they are the streams"
