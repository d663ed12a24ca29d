"""A cache in 8 bits: the operator and transformers see the same numbers, whatever the pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from conmoe_edge.compat import Arguments, cache_argument, cache_of
from conmoe_edge.errors import UsageError
from conmoe_edge.integrations.dense_weights import finish_dense, products_for
from conmoe_edge.model.kv_rows import pack_rows, row_bytes, unpack_rows
from conmoe_edge.model.probe import probe
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.fastpath.install import install
from conmoe_edge.offload.fastpath.packed_cache import PackedLayer, PackedWindowLayer, pack_in_steps
from conmoe_edge.plan.kv_precision import has_int8, with_kv
from tests.families import tiny_model
from tests.offload.fastpath.single_tokens import IDS, steps, transformers_only

EXACT = ("olmoe", "qwen3_moe", "mixtral", "glm4_moe", "qwen2_moe", "phimoe")
CLOSE = ("gpt_oss", "afmoe", "deepseek_v2", "deepseek_v3", "mimo_v2_flash")
NONE = ("qwen3_next", "lfm2_moe", "minimax", "qwen3_5_moe_text")
TOKENS = [5, 9, 33, 71, 20, 11, 7, 8, 61, 2, 44, 30]


def _installed(name: str, **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model: Any = tiny_model(name, dtype=torch.bfloat16, **changes).eval()
    finish_dense(model, products_for(torch.device("cpu")))
    return model, install(model, Machine("cpu", native_bf16=False), 512, "int8")


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_the_operator_and_transformers_read_the_same_rows(name: str) -> None:
    model, report = _installed(name)
    found, cache = steps(model, TOKENS)
    served = report.served
    assert served.layers + served.blocks + served.attention >= 3 * len(TOKENS), "in the operator"
    assert all(type(one) in (PackedLayer, PackedWindowLayer) for one in cache.layers)
    assert all(one.keys.dtype == one.values.dtype == torch.int8 for one in cache.layers)
    with transformers_only():
        wanted, other = steps(model, TOKENS)
    if name in CLOSE:
        assert (found.float() - wanted.float()).abs().max() < 0.04
        return
    assert torch.equal(found, wanted)
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)


@pytest.mark.parametrize("head", [64, 80, 96, 128])
def test_heads_of_other_widths(head: int) -> None:
    model, report = _installed("mixtral", head_dim=head)
    found, _ = steps(model, TOKENS[:4])
    assert report.served.layers + report.served.blocks >= 12
    with transformers_only():
        assert torch.equal(found, steps(model, TOKENS[:4])[0])


@pytest.mark.parametrize("name", NONE)
def test_a_cache_of_another_kind_has_no_such_form(name: str) -> None:
    assert not has_int8(probe(tiny_model(name).config))


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_what_a_layer_holds_is_what_is_counted(name: str) -> None:
    model, _ = _installed(name)
    anatomy = with_kv(probe(model.config), "int8")
    _, cache = steps(model, [])
    held = IDS.shape[1]
    for layer, counted in zip(cache.layers, anatomy.kv, strict=True):
        tokens = layer.keys.shape[-2]
        assert layer.keys[:, :, :1].numel() + layer.values[:, :, :1].numel() == counted.packed
        assert tokens == (held if counted.window is None else min(held, counted.window - 1))


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_a_forward_without_a_cache_sees_the_same_keys(name: str) -> None:
    model, _ = _installed(name)
    with torch.no_grad():
        wanted = model(IDS, use_cache=True)
        bare = model(IDS, use_cache=False)
        given = DynamicCache(config=model.config)
        made = model(IDS, **cache_argument(model, given), use_cache=True)
    assert torch.equal(bare.logits, wanted.logits)
    assert torch.equal(made.logits, wanted.logits)
    assert cache_of(made) is given
    before = Arguments.of(model).positional.index(Arguments.of(model).cache)
    with torch.no_grad():
        by_place = model(IDS, *[None] * before)
    assert torch.equal(by_place.logits, wanted.logits)


@pytest.mark.parametrize("kind", [PackedLayer, PackedWindowLayer])
def test_pieces_of_a_prompt_read_as_one(kind: type) -> None:
    """Whatever the pieces, the last tokens get the same numbers of all that they may look at."""
    generator = torch.Generator().manual_seed(1)
    keys, values = [torch.randn(1, 3, 40, 24, generator=generator).bfloat16() for _ in range(2)]
    wanted = [unpack_rows(pack_rows(one), 24, torch.bfloat16) for one in (keys, values)]
    for pieces in ([40], [1] * 40, [7, 16, 17], [39, 1]):
        layer, start = kind(64), 0
        for count in pieces:
            found = layer.update(
                keys[:, :, start : start + count], values[:, :, start : start + count]
            )
            start += count
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other[:, :, -one.shape[2] :])
        assert layer.get_seq_length() == 40 and layer.keys.shape[-1] == row_bytes(24)


def test_rows_are_cropped_and_chosen_as_numbers_are() -> None:
    plain, packed = DynamicLayer(), PackedLayer(64)
    generator = torch.Generator().manual_seed(2)
    for step in range(12):
        new = [torch.randn(2, 3, 1 + step % 4, 8, generator=generator) for _ in range(2)]
        new = [unpack_rows(pack_rows(one), 8, torch.float32) for one in new]
        for one, other in zip(plain.update(*new), packed.update(*new), strict=True):
            assert torch.equal(one, other)
        for layer in (plain, packed):
            if step % 3 == 1:
                layer.crop(-1)
            elif step % 3 == 2:
                layer.reorder_cache(torch.tensor([1, 1]))
    packed.reset()
    assert packed.get_seq_length() == 0


def test_a_cache_that_was_filled_before_is_packed() -> None:
    """As where a caller brings one."""
    for name in ("olmoe", "gpt_oss"):
        plain: Any = tiny_model(name, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            cache = cache_of(plain(IDS, use_cache=True))
        before = [unpack_rows(pack_rows(one.keys), 8, torch.bfloat16) for one in cache.layers]
        pack_in_steps(cache, 64)
        for layer, keys in zip(cache.layers, before, strict=True):
            assert layer.get_seq_length() == IDS.shape[1]
            new = torch.ones(1, keys.shape[1], 1, 8).bfloat16()
            found, _ = layer.update(new, new)
            assert torch.equal(found[:, :, :-1], keys[:, :, -(found.shape[2] - 1) :])


def test_other_caches_are_refused_by_name() -> None:
    model, _ = _installed("olmoe")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad(), pytest.raises(UsageError, match="StaticCache"):
        model(IDS, **cache_argument(model, cache))


def test_a_cache_without_a_config_gets_its_layers_in_8_bits() -> None:
    model, _ = _installed("olmoe")
    with torch.no_grad():
        wanted = model(IDS, use_cache=True).logits
        cache = DynamicCache()
        found = model(IDS, **cache_argument(model, cache)).logits
    assert torch.equal(found, wanted) and type(cache.layers[0]) is PackedLayer


def test_beams_and_greedy_tokens_through_generate() -> None:
    model, _ = _installed("olmoe")
    with torch.no_grad():
        found = model.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        logits, _ = steps(model, found[0, IDS.shape[1] : -1].tolist())
        assert found[0, IDS.shape[1] :].tolist() == logits.argmax(-1).tolist()
        beams = model.generate(
            IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=3
        )
    assert beams.shape == (1, IDS.shape[1] + 6)
