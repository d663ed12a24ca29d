"""Fused attention in fp32 where bf16 is slow: the same answers, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.integrations.attention import WIDENED, Buffer, suit_attention
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.arithmetic import Machine
from tests.families import tiny_model
from tests.hand_packages import identity, write_package

SLOW, FAST = Machine("cpu", native_bf16=False), Machine("cpu", native_bf16=True)
IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9]])


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "glm4_moe"])  # the others share heads
def test_it_changes_the_arithmetic_and_not_the_result(name: str) -> None:
    torch.manual_seed(0)
    model: Any = tiny_model(name, dtype=torch.bfloat16)
    outputs = []
    with torch.no_grad():
        for _ in range(2):
            first = model(IDS, use_cache=True)
            mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])  # a padded prompt: a mask of its own
            padded = model(IDS, attention_mask=mask)
            later = model(torch.tensor([[3]]), past_key_values=first.past_key_values)
            outputs.append((first.logits, padded.logits[:, 1:], later.logits))
            if model.config._attn_implementation != WIDENED:
                assert suit_attention(model, SLOW)
    assert model.config._attn_implementation == WIDENED
    for before, after in zip(*outputs, strict=True):
        assert torch.allclose(before.float(), after.float(), atol=0.05, rtol=0.05)
    assert any(not torch.equal(before, after) for before, after in zip(*outputs, strict=True))


def test_the_buffer_is_used_again_until_it_is_outgrown() -> None:
    buffer = Buffer()
    key, value = torch.randn(1, 2, 40, 8).bfloat16(), torch.randn(1, 2, 40, 4).bfloat16()
    wide, other = buffer.widen(key, value)
    assert torch.equal(wide, key.float())
    assert torch.equal(other, value.float())
    with torch.inference_mode():
        again, _ = buffer.widen(key[:, :, :30], value[:, :, :30])
    assert again.data_ptr() == wide.data_ptr()
    longer = torch.randn(1, 2, 1000, 8).bfloat16()
    assert torch.equal(buffer.widen(longer, longer)[1], longer.float())


@pytest.mark.parametrize(
    ("machine", "dtype"),
    [(FAST, torch.bfloat16), (SLOW, torch.float32), (Machine("cuda", True), torch.bfloat16)],
)
def test_elsewhere_it_is_left_alone(machine: Machine, dtype: torch.dtype) -> None:
    model: Any = tiny_model("olmoe", dtype=dtype)
    assert not suit_attention(model, machine)
    assert model.config._attn_implementation == "sdpa"


def test_a_package_generates_with_it(tmp_path: Path) -> None:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    packed: Any = load_package(write_package(plain, tmp_path, identity(plain)))
    tokens = packed.generate(IDS, max_new_tokens=8, do_sample=False)
    assert tokens.shape[1] == 16
