"""Sampling settings: their ranges, and what a model's generation config fills in."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from transformers import GenerationConfig

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.sampling_settings import (
    GREEDY,
    LONGEST_ANSWER,
    SamplingSettings,
)

OWN = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "min_p": 0.05,
    "max_new_tokens": 77,
}


def test_what_is_not_given_is_the_models_own() -> None:
    filled = asdict(SamplingSettings().filled(GenerationConfig(**OWN)))
    assert {name: filled[name] for name in filled if name in OWN} == {
        name: value for name, value in OWN.items() if name in filled
    }
    assert (filled["max_tokens"], filled["seed"], filled["stop"]) == (77, None, ())


def test_what_is_given_stays() -> None:
    given = SamplingSettings(3, 0.0, 0.0, 0, 1.0, 5, ("END",), 0.1)
    assert given.filled(GenerationConfig(**OWN)) == given


def test_a_model_that_does_not_draw_is_greedy() -> None:
    filled = SamplingSettings().filled(GenerationConfig(temperature=0.7))
    assert (filled.temperature, filled.max_tokens) == (0.0, LONGEST_ANSWER)
    assert GREEDY.filled(GenerationConfig(**OWN)).repetition_penalty == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"top_p": -1},
        {"top_k": -1},
        {"max_tokens": 0},
        {"stop": "END"},
        {"min_p": 1.5},
        {"frequency_penalty": 2.1},
        {"presence_penalty": -3},
        {"logprobs": 21},
        {"logit_bias": ((3, 101.0),)},
    ],
)
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingSettings(**wrong)
