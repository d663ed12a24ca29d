"""A model whose experts cannot be reached is not called dense, whatever its config calls them."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model import bridge
from conmoe_edge.model.streaming import no_experts


@pytest.mark.parametrize(("kind", "count"), [("dbrx", 4), ("aria", 8), ("longcat_flash", 512)])
def test_experts_that_cannot_be_reached_are_named(kind: str, count: int) -> None:
    error = no_experts(CONFIG_MAPPING[kind]())
    assert f"names {count} experts" in error.why and "registry" in error.why and error.fix
    assert "dense" not in error.what


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3"])
def test_a_model_without_experts_is_dense(kind: str) -> None:
    error = no_experts(CONFIG_MAPPING[kind]())
    assert error.what == f"{kind} is a dense model." and error.fix


def test_what_transformers_cannot_build_need_not_be_a_broken_download() -> None:
    """A DBRX config without ``rope_theta``: its class itself gives none."""
    with pytest.raises(UnsupportedModel) as caught:
        bridge.build_meta(CONFIG_MAPPING["dbrx"](), torch.bfloat16)
    assert "rope_theta" in caught.value.why
    assert "compare config.json" in caught.value.fix and "ownload" not in caught.value.fix
