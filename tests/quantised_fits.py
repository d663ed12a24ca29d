"""What is asked of packages of quantised checkpoints: logits of the expansion at rate 0, and that half of one runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from click.testing import CliRunner
from plain_products import without_operator
from safetensors.torch import save_file

from conmoe_edge import api
from conmoe_edge.cli.main import main
from conmoe_edge.integrations.load import load_package


def check_fits(
    source: Path,
    plain: Mapping[str, torch.Tensor],
    work: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """``plain``: the tensors of the plain checkpoint that ``source`` stands for; ``dtype``: in which both run."""
    near = 2e-5 if dtype == torch.float32 else 2e-2
    fit(source, work / "whole", 0.0)
    with without_operator():
        found = logits(load_package(work / "whole", device="cpu", dtype=dtype))
    wanted = logits(by_transformers(source, plain, work / "plain").to(dtype))
    close = (found - wanted).abs() <= near * float(wanted.abs().max())
    # In bf16 a token whose experts are about as good as others may go to those.
    assert float(close.float().mean()) >= (1.0 if dtype == torch.float32 else 0.98)
    fit(source, work / "half", 0.5)
    half = logits(load_package(work / "half", device="cpu", dtype=torch.float32))
    assert half.isfinite().all() and not torch.allclose(half, wanted, atol=1e-3)
    arguments = ["chat", str(work / "half"), "--prompt", "hello", "--max-tokens", "4"]
    said = CliRunner().invoke(main, arguments)
    assert said.exit_code == 0, said.output


def fit(source: Path, out: Path, rate: float) -> None:
    text = source.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 30)
    api.fit(
        str(source), out, budget="4GB", device="cpu", rate=rate, method="conmoe",
        calibration=text, calibration_tokens=256,
    )  # fmt: skip


def by_transformers(
    source: Path, plain: Mapping[str, torch.Tensor], folder: Path
) -> torch.nn.Module:
    """The model that transformers makes of ``plain``, in fp32."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    save_file(dict(plain), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    # So many that torch multiplies them with expanded weights.
    ids = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()
