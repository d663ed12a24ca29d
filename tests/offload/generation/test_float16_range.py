"""A float16 model whose numbers leave float16's range says so, and the way out that it names works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from transformers import AutoModelForCausalLM

import conmoe_edge
from conmoe_edge.errors import NotFinite
from conmoe_edge.integrations.load import load_package

IDS = torch.arange(5, 17)[None]


def test_an_overflow_is_told_from_a_broken_weight(tmp_path: Path) -> None:
    model = tiny_model("olmoe", dtype=torch.float16, max_position_embeddings=256)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.fill_(30000.0)
        model.model.layers[0].self_attn.v_proj.weight.fill_(300.0)
    model.save_pretrained(tmp_path / "model")
    conmoe_edge.fit(
        str(tmp_path / "model"), tmp_path / "out", budget="900MB", device="cpu", no_tokenizer=True
    )
    loaded = load_package(tmp_path / "out", device="cpu")
    with pytest.raises(NotFinite, match="range of float16") as error, torch.no_grad():
        loaded(IDS, use_cache=False)
    assert "decoder layer 0" in error.value.why and "dtype='float32'" in error.value.fix
    wide = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="float32")
    with torch.no_grad():
        assert bool(wide(IDS, use_cache=False).logits.isfinite().all())
