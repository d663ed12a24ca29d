"""A layer's attention in one call: the same bits as transformers, and only where it is the usual attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.olmoe import modeling_olmoe

from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.offload.fastpath.attention import FusedAttention
from conmoe_edge.offload.fastpath.kv_cache import STEP_TOKENS
from conmoe_edge.offload.fastpath.report import FastPathWarning, warn_once
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.offload.fastpath.single_tokens import (
    IDS,
    installed,
    modules_behind,
    of_family,
    steps,
    transformers_only,
)

USUAL = (
    *("deepseek", "dots1", "glm4_moe", "granitemoe", "granitemoeshared", "minimax_m2", "mixtral"),
    *("hunyuan_v1_moe", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open"),
)
OTHERS = ("minimax",)

pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")


def attending(model: Any) -> list[Any]:
    return modules_behind(model, FusedAttention)


def attentions(model: Any) -> list[FusedAttention]:
    return [module.forward for module in attending(model)]


@pytest.mark.parametrize("name", USUAL)
def test_the_same_bits_as_transformers(name: str) -> None:
    model = of_family(name)
    with transformers_only():
        wanted, held = steps(model, [3, 1, 4, 1, 5])
    found, cache = steps(model, [3, 1, 4, 1, 5])
    assert [one.verified for one in attentions(model)] == [True] * model.config.num_hidden_layers
    assert torch.equal(found, wanted)
    for ours, theirs in zip(cache.layers, held.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("name", OTHERS)
def test_another_attention_is_left_alone(name: str) -> None:
    assert not attentions(of_family(name))


def test_it_is_the_operator_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_family("olmoe")
    _, cache = steps(model, [3, 1])

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers' way was taken")

    monkeypatch.setattr(modeling_olmoe, "apply_rotary_pos_emb", never)
    steps(model, [1, 4], cache)
    with pytest.raises(AssertionError, match="way was taken"), transformers_only():
        steps(model, [1], cache)


def test_rotary_positions_of_another_kind_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return q * cos.unsqueeze(1) + q.roll(1, -1) * sin.unsqueeze(1), k * cos.unsqueeze(1)

    model = of_family("olmoe")
    monkeypatch.setattr(modeling_olmoe, "apply_rotary_pos_emb", turned)
    with transformers_only():
        wanted, _ = steps(model, [3, 1, 4])
    found, _ = steps(model, [3, 1, 4])
    assert [one.verified for one in attentions(model)] == [False] * 3
    assert torch.equal(found, wanted)
    warn_once.cache_clear()
    with pytest.warns(FastPathWarning, match="OlmoeAttention"):
        assert not attentions(of_family("olmoe"))  # the code is another one when it is loaded


def test_a_setting_that_the_operator_does_not_know() -> None:
    model, report = installed("olmoe", clip_qkv=8.0)
    assert not attentions(model) and report.layers[0].reason == "OlmoeAttention with clip_qkv"
    model = of_family("olmoe")
    steps(model, [3, 1])
    model.config.clip_qkv = 0.01
    with transformers_only():
        wanted, _ = steps(model, [3, 1, 4])
    found, _ = steps(model, [3, 1, 4])
    assert torch.equal(found, wanted)


def test_a_part_that_is_watched_is_called() -> None:
    model = of_family("olmoe")
    _, cache = steps(model, [3, 1])
    seen: list[torch.Size] = []
    hook = attending(model)[1].k_proj.register_forward_hook(
        lambda *call: seen.append(call[2].shape)
    )
    steps(model, [4], cache)
    assert len(seen) == 1
    hook.remove()
    steps(model, [4], cache)
    assert len(seen) == 1


def test_a_part_that_was_exchanged_is_called() -> None:
    model = of_family("olmoe")
    steps(model, [3, 1])
    module = attending(model)[0]
    other = torch.nn.Linear(module.v_proj.in_features, module.v_proj.out_features, bias=False)
    module.v_proj = other.to(torch.bfloat16)
    with transformers_only():
        wanted, _ = steps(model, [3, 1, 4])
    found, _ = steps(model, [3, 1, 4])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("part", ["q_proj", "q_norm"])
def test_weights_that_have_moved(part: str) -> None:
    model = of_family("olmoe")
    steps(model, [3, 1])
    weight = getattr(attending(model)[0], part).weight
    weight.data = weight.detach() * 2
    with transformers_only():
        wanted, _ = steps(model, [3, 1, 4])
    found, _ = steps(model, [3, 1, 4])
    assert torch.equal(found, wanted)


def test_a_conversation_longer_than_a_step_of_the_cache_and_one_that_was_cropped() -> None:
    model = of_family("olmoe")
    many = [i % 90 for i in range(STEP_TOKENS + 5)]
    with transformers_only():
        wanted, _ = steps(model, many)
        _, cut = steps(model, [3, 1, 4, 1, 5])
        cut.crop(-3)
        wanted_after, _ = steps(model, [7, 8], cut)
    found, _ = steps(model, many)
    assert torch.equal(found, wanted)
    _, cut = steps(model, [3, 1, 4, 1, 5])
    cut.crop(-3)
    found_after, _ = steps(model, [7, 8], cut)
    assert torch.equal(found_after, wanted_after)


def test_batches_and_masks_go_to_transformers() -> None:
    model = of_family("olmoe")
    steps(model, [3, 1])  # agreed
    two = torch.cat([IDS, IDS.flip(1)])
    results = []
    for only in (True, False):
        mask = torch.ones(2, 8, dtype=torch.int64)
        mask[0, :3] = 0
        with torch.inference_mode(), transformers_only() if only else pytest.MonkeyPatch.context():
            out = model(two, attention_mask=mask, use_cache=True)
            more = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            token = torch.tensor([[3], [4]])
            out = model(token, attention_mask=more, **cache_argument(model, cache_of(out)))
            results.append(out.logits)
    assert torch.equal(*results)


def test_generate_gives_the_same_tokens() -> None:
    model = of_family("olmoe")
    asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    with transformers_only():
        wanted = model.generate(IDS, **asked)
    assert torch.equal(model.generate(IDS, **asked), wanted)
    beams = {**asked, "num_beams": 3}
    with transformers_only():
        wanted = model.generate(IDS, **beams)
    assert torch.equal(model.generate(IDS, **beams), wanted)


def test_another_implementation_asked_for_later_is_used() -> None:
    model = of_family("olmoe")
    steps(model, [3, 1])
    model.set_attn_implementation("eager")
    with transformers_only():
        wanted, _ = steps(model, [3, 1, 4])
    found, _ = steps(model, [3, 1, 4])
    assert torch.equal(found, wanted)
