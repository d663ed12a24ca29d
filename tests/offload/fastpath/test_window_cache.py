"""A cache layer with a window has room for a token: the same keys and values as transformers' own steps leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from conmoe_edge.offload.fastpath.window_cache import has_one_more, room_in_window
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.offload.fastpath.single_tokens import of_family, steps, transformers_only

WINDOW, HEADS, WIDTH, VALUES = 6, 2, 4, 8


def token(seed: int, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = [
        torch.randn(1, HEADS, count, width, generator=generator).bfloat16()
        for width in (WIDTH, VALUES)
    ]
    return keys, values


def write(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """What the operator does with the room that it is given."""
    assert room_in_window(layer, HEADS, WIDTH, VALUES) is not None
    for view, buffer, new in zip(
        (layer.keys, layer.values), layer._conmoe_buffers, (keys, values), strict=True
    ):
        start = view.storage_offset() // view.shape[-1]
        buffer[:, :, start + view.shape[-2]] = new[:, :, 0]
    has_one_more(layer)


def same(ours: Any, theirs: Any) -> bool:
    held = ours.get_seq_length() == theirs.get_seq_length()
    return held and torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("prompt", [1, 3, 5, 6, 9])
def test_tokens_one_by_one(prompt: int) -> None:
    ours, theirs = (DynamicSlidingWindowLayer(WINDOW) for _ in range(2))
    for layer in (ours, theirs):
        layer.update(*token(0, prompt))
    places = set()
    for number in range(1, 40):
        write(ours, *token(number))
        theirs.update(*token(number))
        assert same(ours, theirs)
        places.add(ours._conmoe_buffers[0].data_ptr())
    assert len(places) < 40 // (WINDOW - 1) + 2  # it is not copied for every token


def test_several_tokens_at_once_between() -> None:
    ours, theirs = (DynamicSlidingWindowLayer(WINDOW) for _ in range(2))
    for layer in (ours, theirs):
        layer.update(*token(0, 4))
    for number in range(1, 30):
        if number % 4:
            write(ours, *token(number))
        else:
            ours.update(*token(number, 3))
        theirs.update(*token(number, 1 if number % 4 else 3))
        assert same(ours, theirs)


def test_what_was_cropped_is_written_over() -> None:
    ours, theirs = (DynamicSlidingWindowLayer(WINDOW) for _ in range(2))
    for layer in (ours, theirs):
        layer.update(*token(0, 2))
    for number in (1, 2):
        write(ours, *token(number))
        theirs.update(*token(number))
    for layer in (ours, theirs):
        layer.crop(-2)
    for number in range(3, 12):
        write(ours, *token(number))
        theirs.update(*token(number))
        assert same(ours, theirs)


def test_where_there_is_no_room() -> None:
    layer = DynamicSlidingWindowLayer(WINDOW)
    assert room_in_window(layer, HEADS, WIDTH, VALUES) is None  # nothing is held
    layer.update(*token(0, 3))
    assert room_in_window(layer, HEADS + 1, WIDTH, VALUES) is None
    layer.record_past = True
    assert room_in_window(layer, HEADS, WIDTH, VALUES) is None


@pytest.mark.skipif(operator() is None, reason="no compiler here")
def test_generate_gives_the_same_tokens() -> None:
    model = of_family("gpt_oss")
    ids = torch.tensor([[5, 17, 33, 80, 12, 64, 9, 9]])
    for more in ({}, {"num_beams": 3}):
        asked: dict[str, Any] = {
            "max_new_tokens": 24,
            "do_sample": False,
            "pad_token_id": 0,
            **more,
        }
        with transformers_only():
            wanted = model.generate(ids, **asked)
        assert torch.equal(model.generate(ids, **asked), wanted)


@pytest.mark.skipif(operator() is None, reason="no compiler here")
def test_a_part_that_has_a_hook_is_called() -> None:
    model = of_family("gpt_oss")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    with transformers_only():
        wanted, _ = steps(model, tokens)
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    found, cache = steps(model, tokens[:4])
    hook.remove()
    rest, _ = steps(model, tokens[4:], cache)
    assert torch.equal(torch.cat([found, rest]), wanted)
