"""Packages for engines that read plain checkpoints: every expert kept, all with the same fewer neurons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM

import conmoe_edge
from conmoe_edge import api
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import DoesNotFit, UsageError
from conmoe_edge.export.hf import export_hf
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serving import request_for

IDS = torch.tensor([[5, 9, 33, 12, 60, 61, 7, 8, 20]])


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("olmoe", "intermediate_size"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("gpt_oss", "intermediate_size"),
    ],
)
def test_a_smaller_plain_checkpoint_with_every_expert(
    family: str, field: str, tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "source", **{field: 64})
    save_tokenizer(source)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    conmoe_edge.fit(
        str(source),
        tmp_path / "package",
        budget="4GB",
        device="cpu",
        rate=0.5,
        engine="hf",
        calibration=tmp_path / "text.txt",
        calibration_tokens=512,
    )
    manifest = load_manifest(tmp_path / "package")
    assert len(manifest.layouts) == 1
    for layer, row in manifest.slots.items():
        found = [(slot.prototype.layer, slot.prototype.expert) for slot in row if slot.prototype]
        assert found == [(layer, expert) for expert in range(8)]
        assert all((slot.constant is None) == (family != "gpt_oss") for slot in row)
    done = export_hf(tmp_path / "package", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (done.width, config[field]) == (32, 32)
    assert not any("Saves no memory" in note for note in done.notes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", local_files_only=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits,
            conmoe_edge.load(tmp_path / "package", device="cpu")(IDS).logits,
            atol=2e-5,
            rtol=1e-4,
        )


def test_the_least_budget_that_is_named_works(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit) as caught:
        api.plan("demo", budget="300MB", device="cpu", engine="hf")
    least = caught.value.fix.split()[1]
    assert api.plan("demo", budget=least, device="cpu", engine="hf").plan.chosen.width == 32


def test_a_larger_budget_never_gives_narrower_experts() -> None:
    widths = [
        api.plan("demo", budget=f"{size}MB", device="cpu", engine="hf").plan.chosen.width
        for size in range(570, 700, 10)
    ]
    assert widths == sorted(widths) and widths[-1] == 96


def test_what_a_plain_checkpoint_cannot_say_is_refused() -> None:
    with pytest.raises(UsageError, match="--precision int4 does not go with --for gguf"):
        request_for("gguf", PlanRequest(precision="int4"))
    with pytest.raises(UsageError, match="--method conmoe"):
        request_for("hf", PlanRequest(method="conmoe"))
