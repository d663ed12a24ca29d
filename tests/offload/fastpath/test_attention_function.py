"""Attention of one new token by the operator: the same answers as transformers' own, and only where it is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.fastpath.attention_function import (
    SUITED,
    one_token_attention,
    suit_attention,
)
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import BY_NAME, tiny_model
from tests.hand_packages import identity, write_package

SLOW, FAST = Machine("cpu", native_bf16=False), Machine("cpu", native_bf16=True)
IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9]])

pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("size", "width"), [(128, 128), (64, 96), (20, 20)])
def test_against_plain_products(heads: int, groups: int, size: int, width: int) -> None:
    generator = torch.Generator().manual_seed(heads * size)
    query = torch.randn(1, heads, 1, size, generator=generator).bfloat16()
    room = torch.randn(2, 1, groups, 50, max(size, width), generator=generator).bfloat16()
    key = room[0, :, :, :, :size].contiguous()[:, :, :37]  # a view of a longer cache
    value = room[1, :, :, :, :width].contiguous()[:, :, :37]
    out, _ = one_token_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    wide_key = key.double().repeat_interleave(heads // groups, 1)
    wide_value = value.double().repeat_interleave(heads // groups, 1)
    weights = torch.softmax(query.double() @ wide_key.transpose(2, 3) * 0.3, -1)
    expected = (weights @ wide_value).transpose(1, 2)
    assert out.shape == expected.shape
    assert torch.allclose(out.double(), expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_family_says_the_same(name: str) -> None:
    torch.manual_seed(0)
    model: Any = tiny_model(name, dtype=torch.bfloat16)
    results = []
    with torch.no_grad():
        for suited in (False, True):
            if suited and not suit_attention(model, SLOW):
                pytest.skip("this family brings an attention of its own")
            first = model(IDS, use_cache=True)
            later = model(torch.tensor([[3]]), **cache_argument(model, cache_of(first)))
            results.append((first.logits, later.logits))
    assert torch.equal(results[0][0], results[1][0])  # a prompt is left alone
    before, after = results[0][1].float(), results[1][1].float()
    assert torch.allclose(before, after, atol=0.06 * before.abs().max().item())


@pytest.mark.parametrize(
    ("machine", "dtype"),
    [(FAST, torch.float32), (SLOW, torch.float32), (Machine("cuda", True), torch.bfloat16)],
)
def test_elsewhere_it_is_left_alone(machine: Machine, dtype: torch.dtype) -> None:
    model: Any = tiny_model("olmoe", dtype=dtype)
    assert not suit_attention(model, machine)
    assert model.config._attn_implementation == "sdpa"


def test_masks_and_batches_are_transformers_business() -> None:
    query, key = torch.randn(1, 2, 1, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16()
    mask = torch.tensor([True, False, True, True, True]).view(1, 1, 1, 5)
    masked, _ = one_token_attention(torch.nn.Module(), query, key, key, mask)
    short = key[:, :, [0, 2, 3, 4]]
    without, _ = one_token_attention(torch.nn.Module(), query, short, short, None)
    assert torch.allclose(masked.float(), without.float(), atol=0.02)
    pair = one_token_attention(
        torch.nn.Module(),
        query.repeat(2, 1, 1, 1),
        key.repeat(2, 1, 1, 1),
        key.repeat(2, 1, 1, 1),
        None,
    )[0]
    assert pair.shape == (2, 1, 2, 8)


def test_a_package_generates_with_it(tmp_path: Path) -> None:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    packed: Any = load_package(write_package(plain, tmp_path, identity(plain)))
    tokens = packed.generate(IDS, max_new_tokens=8, do_sample=False)
    assert tokens.shape[1] == 16
    assert packed.config._attn_implementation == SUITED
