"""What may be drawn, beside transformers' own logits processors over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conmoe_edge.offload.generation.likely_tokens import Likely, likely
from conmoe_edge.offload.generation.sampling import Sampler
from conmoe_edge.offload.generation.sampling_settings import GREEDY, SamplingSettings

VOCABULARY = 3000


def settings(temperature: float, top_k: int, top_p: float, min_p: float) -> SamplingSettings:
    return SamplingSettings(9, temperature, top_p, top_k, 1.0, 1, (), min_p)


def by_transformers(scores: torch.Tensor, wanted: SamplingSettings) -> torch.Tensor:
    """Chances fp64 [V]."""
    found = LogitsProcessorList([TemperatureLogitsWarper(float(wanted.temperature or 0))])
    if wanted.top_k:
        found.append(TopKLogitsWarper(wanted.top_k))
    if wanted.top_p is not None and wanted.top_p < 1.0:
        found.append(TopPLogitsWarper(wanted.top_p))
    if wanted.min_p:
        found.append(MinPLogitsWarper(wanted.min_p))
    return torch.softmax(found(torch.tensor([[1]]), scores.double()[None])[0], -1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 2, 40, 5000])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(1.0, 0.0), (0.9, 0.0), (0.3, 0.0), (0.95, 0.05), (1.0, 0.2)]
)
def test_it_is_what_transformers_leaves(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    wanted = settings(temperature, top_k, top_p, min_p)
    draw = torch.Generator().manual_seed(7)
    for spread in (0.01, 1.0, 4.0, 30.0):
        scores = torch.randn(VOCABULARY, generator=draw) * spread
        scores[torch.randint(VOCABULARY, (50,), generator=draw)] = -torch.inf  # as a grammar does
        found = likely(scores.numpy(), wanted)
        assert found is not None
        chances = torch.zeros(VOCABULARY, dtype=torch.float64)
        chances[torch.from_numpy(found.tokens)] = torch.from_numpy(found.chances)
        right = by_transformers(scores, wanted)
        assert torch.equal(chances > 0, right > 0)
        torch.testing.assert_close(chances, right, rtol=1e-5, atol=1e-12)


def test_equals_go_by_their_numbers() -> None:
    """``top_k`` keeps all that are as likely as the last, ``top_p`` the first of them."""
    scores = np.array([1, 3, 3, 0, 3, 3, 2], np.float32)
    by_number = likely(scores, settings(1.0, 2, 1.0, 0.0))
    assert by_number is not None and by_number.tokens.tolist() == [1, 2, 4, 5]
    share = likely(scores, settings(1.0, 2, 0.6, 0.0))
    assert share is not None and share.tokens.tolist() == [1, 2, 4]
    assert share.chances.tolist() == pytest.approx([1 / 3] * 3)
    assert likely(np.full(5, np.nan, np.float32), settings(1.0, 0, 0.9, 0.0)) is None
    assert likely(np.full(5, -np.inf, np.float32), settings(1.0, 0, 0.9, 0.0)) is None


def test_shares_lead_to_tokens_as_often_as_chances_say() -> None:
    found = Likely(np.array([8, 3, 5, 9]), np.array([0.5, 0.25, 0.25, 0.0]))
    edges = [(0.0, 8), (0.499, 8), (0.5, 3), (0.749, 3), (0.75, 5), (1 - 2**-53, 5)]
    assert [found.at(share) for share, _ in edges] == [token for _, token in edges]
    none_first = Likely(np.array([8, 3]), np.array([0.0, 1.0]))
    assert none_first.at(0.0) == 3


def drawn(wanted: SamplingSettings, scores: Any, times: int) -> list[int]:
    sampler = Sampler(wanted)
    return [sampler.next([0], scores) for _ in range(times)]


@pytest.mark.parametrize("wanted", [settings(0.8, 0, 1.0, 0.0), settings(1.3, 8, 0.9, 0.02)])
def test_draws_are_even_and_a_seed_gives_the_same(wanted: SamplingSettings) -> None:
    scores = torch.randn(1, 24, generator=torch.Generator().manual_seed(2)) * 2
    times = 20_000
    found = drawn(wanted, scores, times)
    assert drawn(wanted, scores, times) == found
    chances = by_transformers(scores[0], wanted)
    counts = torch.bincount(torch.tensor(found), minlength=24).double()
    expected = chances * times
    assert not counts[expected == 0].any()
    there = expected > 0
    squares = ((counts - expected)[there] ** 2 / expected[there]).sum()
    degrees = int(there.sum()) - 1
    assert float(squares) < degrees + 5 * (2 * degrees) ** 0.5  # chi-squared, five deviations


def test_scores_in_bf16_draw_as_the_same_in_fp32() -> None:
    scores = torch.randn(1, 500, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = settings(0.8, 40, 0.95, 0.0)
    assert drawn(wanted, scores, 50) == drawn(wanted, scores.float(), 50)
    assert set(drawn(GREEDY, scores, 3)) == {int(scores.float().argmax())}
