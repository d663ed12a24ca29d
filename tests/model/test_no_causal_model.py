"""Kinds of model that transformers builds no causal language model of are refused by name, with a true reason."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.probe import probe


@pytest.mark.parametrize(
    ("kind", "word"),
    [("qwen3_vl_moe", "vision"), ("glm4v_moe", "vision"), ("switch_transformers", "do not go on")],
)
def test_a_kind_without_one_is_named(kind: str, word: str) -> None:
    config = AutoConfig.for_model(kind)
    config.dtype = torch.bfloat16
    with pytest.raises(UnsupportedModel, match=f"no causal language model for {kind}") as error:
        probe(config)
    assert word in error.value.why
    assert "ownload" not in error.value.fix
    assert "text-only" in error.value.fix
