"""What transformers knows, but not as a causal language model, is refused by ``plan``, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import save_tiny

from conmoe_edge import api
from conmoe_edge.errors import UnsupportedModel


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("ernie4_5_vl_moe", "baidu/ERNIE-4.5-21B-A3B-PT"),
        ("qwen3_omni_moe", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("diffusion_gemma", "run this one as it is"),
        ("t5", "run this one as it is"),
    ],
)
def test_each_is_refused_by_name(kind: str, instead: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from conmoe_edge.model.probe import probe

    with pytest.raises(UnsupportedModel) as error:
        probe(CONFIG_MAPPING[kind]())
    assert error.value.what.startswith(f"{kind} cannot be consolidated")
    assert instead in error.value.fix


@pytest.mark.parametrize("kind", ["qwen3_omni_moe", "t5"])
def test_a_type_that_is_not_that_of_the_weights(tmp_path: Path, kind: str) -> None:
    save_tiny("olmoe", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": kind}))
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        api.plan(str(tmp_path), budget="4GB")
