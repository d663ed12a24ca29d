"""A machine without the operator: packages run all the same, by torch's own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.kernels.cpu import bindings
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.plain_products import without_operator


@pytest.fixture
def by_torch() -> Iterator[None]:
    with without_operator():
        yield


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_a_package_gives_what_the_model_gives(name: str, tmp_path: Path) -> None:
    assert bindings.operator() is None and "CONMOE_OPERATOR=off" in bindings.why_not()
    model = tiny_model(name, dtype=torch.bfloat16)
    loaded = load_package(write_package(model, tmp_path / "package", identity(model)))
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits.float()
        whole = loaded(ids).logits.float()
        cache, steps = None, []
        for position in range(ids.shape[1]):
            out = loaded(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits.float())
    # A router's choice between two equals may fall to the other side in bf16, for a token.
    for found in (whole, torch.cat(steps, 1)):
        assert float((found - wanted).norm() / wanted.norm()) < 0.05
