"""Flags in config.json that say what a forward gives back: our runs set their own, and a package keeps the file's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from families import save_tiny, save_tokenizer

from conmoe_edge import api

FLAGS = {
    "output_router_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "use_cache": False,
}


def test_output_flags_are_kept_and_not_obeyed(tmp_path: Path) -> None:
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    save_tiny("olmoe", source)
    save_tokenizer(source)
    config = source / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **FLAGS}))
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        rate=0.5,
        calibration=text,
        calibration_tokens=1024,
    )
    kept = json.loads((out / "config.json").read_text())
    assert {name: kept[name] for name in FLAGS} == FLAGS
    model = api.load(out, device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
