"""The runtime on a GPU: staging ring, copy stream, tier in host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.integrations.load import load_package
from conmoe_edge.memory.budget import Budget
from tests.families import tiny_model
from tests.hand_packages import materialise, thirds, write_package

pytestmark = pytest.mark.gpu

IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9, 41, 27, 3, 58, 77, 21, 30, 90]])


def _budget(host_bytes: int) -> Budget:
    return Budget("cuda", 4 << 30, "4GiB", "test", host_bytes=host_bytes)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("host_bytes", [0, 60_000, 1 << 30])
def test_slots_and_tiers_change_nothing(name: str, host_bytes: int, tmp_path: Path) -> None:
    plain = tiny_model(name)
    slots = thirds(plain)
    folder = write_package(plain, tmp_path, slots)
    everything = load_package(folder, budget=_budget(0), device="cuda")
    expected = _logits(everything)
    assert torch.allclose(expected, _logits(materialise(plain, slots)), atol=1e-3)
    tokens = everything.generate(IDS.cuda(), max_new_tokens=12, do_sample=False).tolist()
    for count in (1, 2, 5):
        few = load_package(folder, budget=_budget(host_bytes), device="cuda", slots=(count,))
        for _ in range(3):
            assert torch.equal(_logits(few), expected)
        assert few.generate(IDS.cuda(), max_new_tokens=12, do_sample=False).tolist() == tokens
        few.conmoe.close()


def test_retreat_gives_memory_back(tmp_path: Path) -> None:
    plain = tiny_model("olmoe", hidden_size=512, moe_intermediate_size=1024, intermediate_size=1024)
    model = load_package(write_package(plain, tmp_path, thirds(plain)), device="cuda")
    expected = _logits(model)
    before = torch.cuda.memory_allocated()
    held = model.conmoe.stats().slot_bytes
    assert model.conmoe.retreat()
    assert before - torch.cuda.memory_allocated() >= held - model.conmoe.stats().slot_bytes - 4096
    assert torch.equal(_logits(model), expected)
