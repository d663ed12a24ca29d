"""The growing cache against transformers' own: same state, same logits, same tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from conmoe_edge.compat import Arguments, cache_of
from conmoe_edge.offload.fastpath import kv_cache
from conmoe_edge.offload.fastpath.kv_cache import GrowingLayer, grow_in_steps
from tests.families import BY_NAME, tiny_model

IDS = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9, 41, 27], [2, 71, 33, 8, 12, 4, 90, 9, 1, 27]])


def _tokens(count: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, count, 4, generator=generator)


def _both(limit: int = 64) -> tuple[DynamicLayer, GrowingLayer]:
    return DynamicLayer(), GrowingLayer(limit)


def _feed(layers: tuple[DynamicLayer, GrowingLayer], count: int, seed: int, batch: int = 2) -> None:
    keys, values = _tokens(count, batch, seed), _tokens(count, batch, seed + 1000)
    expected = layers[0].update(keys, values)
    found = layers[1].update(keys, values)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert layers[0].get_seq_length() == layers[1].get_seq_length()


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "STEP_TOKENS", 4)


def test_any_sequence_of_operations_leaves_the_same_state() -> None:
    generator = torch.Generator().manual_seed(3)
    for run in range(30):
        layers = _both()
        batch = 2
        for step in range(25):
            kind = int(torch.randint(0, 9, (1,), generator=generator))
            held = layers[0].get_seq_length()
            for layer in layers:
                if kind == 0 and held > 1:
                    layer.crop(-(1 + step % (held - 1)))
                elif kind == 1 and held:
                    layer.reorder_cache(torch.arange(batch).flip(0))
                elif kind == 2 and held:
                    layer.batch_select_indices(torch.tensor([0]))
                elif kind == 3 and held and batch == 1:
                    layer.batch_repeat_interleave(2)
                elif kind == 4:
                    layer.reset()
            batch = {2: 1, 3: 2}.get(kind, batch) if held else batch
            _feed(layers, 1 + step % 5, run * 100 + step, batch)


def test_a_token_is_written_in_place_and_a_step_is_copied_once() -> None:
    layer = GrowingLayer(1000)
    places = []
    for i in range(12):
        keys, _ = layer.update(_tokens(1, 1, i), _tokens(1, 1, i))
        places.append(keys.data_ptr())
    assert [places[i] == places[i - 1] for i in range(1, 12)] == [i % 4 != 0 for i in range(1, 12)]


def test_no_room_beyond_the_limit_unless_needed() -> None:
    layer = GrowingLayer(limit=10)
    layer.update(_tokens(5), _tokens(5))  # two sequences: room for five each
    assert layer._key_buffer is not None and layer._key_buffer.shape[-2] == 5
    layer.update(_tokens(6), _tokens(6))
    assert layer._key_buffer.shape[-2] == 11


def test_a_copy_of_the_cache_goes_its_own_way() -> None:
    layer = GrowingLayer(64)
    layer.update(_tokens(5), _tokens(5))
    other = copy.deepcopy(layer)
    first, _ = layer.update(_tokens(1, seed=1), _tokens(1, seed=1))
    kept = first.clone()
    other.update(_tokens(1, seed=2), _tokens(1, seed=2))
    assert torch.equal(first, kept) and not torch.equal(kept, other.keys)


def test_gradients_get_tensors_of_their_own() -> None:
    layer = GrowingLayer(64)
    layer.update(_tokens(3), _tokens(3))
    keys = _tokens(1, seed=1).requires_grad_()
    out, _ = layer.update(keys, _tokens(1, seed=1))
    first = (out * out).sum()
    layer.update(_tokens(1, seed=2).requires_grad_(), _tokens(1, seed=2))
    first.backward()
    assert torch.equal(keys.grad, 2 * keys.detach())


def test_from_inference_mode_to_plain() -> None:
    layers = _both()
    with torch.inference_mode():
        _feed(layers, 3, 0)
    with torch.no_grad():
        _feed(layers, 1, 1)
        _feed(layers, 1, 2)


def test_only_the_plain_kind_is_replaced() -> None:
    model = tiny_model("gpt_oss")
    cache = DynamicCache(config=model.config)
    kinds = [type(layer) for layer in cache.layers]
    assert len(set(kinds)) == 2, "this family has sliding and full layers"
    grow_in_steps(cache, 64)
    for before, layer in zip(kinds, cache.layers, strict=True):
        assert type(layer) is (GrowingLayer if before is DynamicLayer else before)
    assert type(cache) is DynamicCache


def _grow(model: Any) -> None:
    """Let the caches that ``model`` is called with grow in steps."""
    model.register_forward_pre_hook(
        lambda module, args, kwargs: grow_in_steps(cache_of(kwargs), 64), with_kwargs=True
    )


def _run(model: Any, cuts: list[int]) -> tuple[list[torch.Tensor], Any]:
    """Logits of a prompt in pieces, then token by token."""
    cache, out, start = None, [], 0
    name = Arguments.of(model).cache
    with torch.no_grad():
        for end in [*cuts, *range(cuts[-1] + 1, IDS.shape[1] + 1)]:
            got = model(IDS[:1, start:end], **{name: cache}, use_cache=True)
            cache, start = cache_of(got), end
            out.append(got.logits)
    return out, cache


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_family_computes_the_same(name: str) -> None:
    plain = tiny_model(name)
    # Linear attention takes a prompt whole and then single tokens; that is the model's business.
    expected, _ = _run(plain, [3])
    tokens = plain.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    _grow(plain)
    found, cache = _run(plain, [3])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    again = plain.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, again)
    if name == "olmoe":
        assert all(type(layer) is GrowingLayer for layer in cache.layers)


def test_beams_and_chunks_and_crop() -> None:
    plain, growing = tiny_model("olmoe"), tiny_model("olmoe")
    _grow(growing)
    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "num_beams": 3}
    assert torch.equal(plain.generate(IDS, **settings), growing.generate(IDS, **settings))
    expected, _ = _run(plain, [4, 7])
    found, cache = _run(growing, [4, 7])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    cache.crop(-4)
    with torch.no_grad():
        name = Arguments.of(plain).cache
        again = growing(IDS[:1, 6:7], **{name: cache}, use_cache=True).logits
        _, fresh = _run(plain, [4, 7])
        fresh.crop(-4)
        assert torch.equal(again, plain(IDS[:1, 6:7], **{name: fresh}, use_cache=True).logits)
