"""One new token takes transformers' plain attention where the fused one is slow; the answer stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.integrations.attention import suit_attention
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.arithmetic import Machine
from tests.families import tiny_model
from tests.hand_packages import identity, write_package

SLOW, FAST = Machine("cpu", native_bf16=False), Machine("cpu", native_bf16=True)
IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9]])


def test_it_changes_with_the_number_of_tokens_and_not_the_result() -> None:
    torch.manual_seed(0)
    model: Any = tiny_model("olmoe", dtype=torch.bfloat16)
    model.config.num_key_value_heads = model.config.num_attention_heads
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        first = model(IDS, use_cache=True)
        before = model(torch.tensor([[3]]), past_key_values=first.past_key_values).logits
        if not suit_attention(model, SLOW):
            pytest.skip("this family shares heads")
        again = model(IDS, use_cache=True)
        assert model.config._attn_implementation == "sdpa"
        after = model(input_ids=torch.tensor([[3]]), past_key_values=again.past_key_values).logits
        assert model.config._attn_implementation == "eager"
    assert torch.allclose(before.float(), after.float(), atol=0.05, rtol=0.05)
    assert torch.equal(first.logits, again.logits)


@pytest.mark.parametrize(
    ("machine", "dtype"),
    [(FAST, torch.bfloat16), (SLOW, torch.float32), (Machine("cuda", True), torch.bfloat16)],
)
def test_elsewhere_it_is_left_alone(machine: Machine, dtype: torch.dtype) -> None:
    model: Any = tiny_model("olmoe", dtype=dtype)
    assert not suit_attention(model, machine)


def test_shared_heads_keep_the_fused_function() -> None:
    model: Any = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert not suit_attention(model, SLOW)


def test_a_package_generates_with_it(tmp_path: Path) -> None:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    packed: Any = load_package(write_package(plain, tmp_path, identity(plain)))
    tokens = packed.generate(IDS, max_new_tokens=8, do_sample=False)
    assert tokens.shape[1] == 16
