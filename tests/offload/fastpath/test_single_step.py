"""Single tokens without the model's own steps around its layers, beside the same tokens with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.fastpath import single_step
from conmoe_edge.offload.fastpath.fingerprint import Fingerprint
from conmoe_edge.offload.fastpath.single_step import SingleStep
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.offload.fastpath.single_tokens import random_parts, steps

pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")

TOKENS = [3 + 7 * i % 90 for i in range(72)]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v2", {}),
    ("deepseek_v3", {}),
    ("dots1", {}),
    ("ernie4_5_moe", {}),
    ("exaone_moe", {}),
    ("flex_olmo", {}),
    ("glm4_moe", {}),
    ("gpt_oss", {}),
    ("hunyuan_v1_moe", {}),
    ("minimax_m2", {}),
    ("mixtral", {}),
    ("olmoe", {}),
    ("phimoe", {}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {}),
    ("solar_open", {}),
]


class Taken:
    """Counts the tokens that came this way, and can send them the model's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.off = 0, False
        own_scores, own_takes = SingleStep._scores, SingleStep._takes

        def scores(step: SingleStep, *args: Any) -> Any:
            found = own_scores(step, *args)
            self.count += found is not None
            return found

        patch.setattr(SingleStep, "_scores", scores)
        patch.setattr(
            SingleStep, "_takes", lambda step, *args: not self.off and own_takes(step, *args)
        )


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(monkeypatch)


def package(name: str, folder: Path, **changes: Any) -> Any:
    plain = random_parts(tiny_model(name, dtype=torch.bfloat16, **changes).eval())
    kind: Kind = "int8" if name == "gpt_oss" else "plain"  # what the operator takes of its experts
    return load_package(write_package(plain, folder, identity(plain), kind=kind))


def same(one: Any, other: Any) -> bool:
    """Whether two caches hold the same."""
    return all(
        torch.equal(mine.keys, its.keys) and torch.equal(mine.values, its.values)
        for mine, its in zip(one.layers, other.layers, strict=True)
    )


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_scores_and_caches_are_those_of_the_models_own_steps(
    name: str, changes: dict[str, Any], tmp_path: Path, taken: Taken
) -> None:
    model = package(name, tmp_path, **changes)
    report = model.conmoe.fast_path
    assert report.around == "" and report.to_json()["around"] == ""
    steps(model, TOKENS[:3])  # layers compute their first token both ways
    taken.off = True
    wanted, own = steps(model, TOKENS)
    taken.off, taken.count = False, 0
    before = report.served.layers
    found, cache = steps(model, TOKENS)
    assert taken.count == len(TOKENS)
    assert report.served.layers - before == len(TOKENS) * len(report.layers)
    assert torch.equal(found, wanted) and same(cache, own)
    model.conmoe.close()


@pytest.fixture
def olmoe(tmp_path: Path) -> Any:
    model = package("olmoe", tmp_path)
    steps(model, TOKENS[:3])
    return model


def counted(taken: Taken, model: Any, cache: Any, **arguments: Any) -> tuple[Any, int]:
    """What a model gives for one more token, and how many came this way."""
    taken.count = 0
    with torch.inference_mode():
        out = model(torch.tensor([[7]]), **cache_argument(model, cache), **arguments)
    return out, taken.count


def test_what_asks_for_more_or_hides_something_goes_the_models_way(
    olmoe: Any, taken: Taken
) -> None:
    _, cache = steps(olmoe, TOKENS[:2])
    held = cache.get_seq_length()
    out, count = counted(taken, olmoe, cache, attention_mask=torch.ones(1, held + 1).long())
    assert count == 1 and type(out).__name__ == "MoeCausalLMOutputWithPast"
    assert cache_of(out) is cache and out.logits.shape[:2] == (1, 1)
    hidden = torch.ones(1, held + 2).long()
    hidden[0, 0] = 0
    for arguments in (
        {"attention_mask": hidden},
        {"return_dict": False},
        {"labels": torch.tensor([[7]])},
        {"logits_to_keep": torch.tensor([0])},
    ):
        asked = steps(olmoe, TOKENS[:2])[1]
        if "attention_mask" in arguments:
            arguments = {"attention_mask": hidden[:, : asked.get_seq_length() + 1]}
        _, count = counted(taken, olmoe, asked, **arguments)
        assert count == 0, arguments
    assert counted(taken, olmoe, steps(olmoe, TOKENS[:2])[1])[1] == 1
    asked = steps(olmoe, TOKENS[:2])[1]
    out, count = counted(taken, olmoe, asked, output_hidden_states=True)
    assert count == 0 and len(out.hidden_states) == 4


def test_hooks_and_exchanged_parts_are_called(olmoe: Any, taken: Taken) -> None:
    """Each of them at a time when tokens have gone by them for long."""
    decoder, seen = olmoe.model, []
    note = lambda *call: seen.append(call[0])  # noqa: E731
    _, cache = steps(olmoe, TOKENS[:4])
    for part in (
        decoder,
        decoder.layers[1],
        decoder.layers[1].self_attn.q_proj,
        decoder.layers[2].mlp.gate,
    ):
        assert counted(taken, olmoe, cache)[1] == 1
        hook = part.register_forward_hook(note)
        assert counted(taken, olmoe, cache)[1] == 0 and seen == [part]
        hook.remove()
        seen.clear()
    for part in (decoder.embed_tokens, decoder.norm, olmoe.lm_head):  # called as they are
        hook = part.register_forward_hook(note)
        assert counted(taken, olmoe, cache)[1] == 1 and seen == [part]
        hook.remove()
        seen.clear()
    olmoe.config.output_hidden_states = True
    assert counted(taken, olmoe, cache)[1] == 0


def test_weights_that_move_are_found(olmoe: Any, taken: Taken) -> None:
    taken.off = True
    weight = olmoe.model.layers[1].input_layernorm.weight
    with torch.no_grad():
        weight.mul_(3)  # in place: where it lay
    wanted, _ = steps(olmoe, TOKENS[:6])
    with torch.no_grad():
        weight.div_(3)
    taken.off = False
    _, cache = steps(olmoe, TOKENS[:6])
    assert counted(taken, olmoe, cache)[1] == 1
    olmoe.model.layers[1].input_layernorm.weight.data = (weight.detach() * 3).clone()
    assert torch.equal(steps(olmoe, TOKENS[:6])[0], wanted)


def test_conversations_take_turns_and_go_back(olmoe: Any, taken: Taken) -> None:
    """Rooms that are known for the next token are those of the cache that it is in, as it is then."""
    taken.off = True
    first, one = steps(olmoe, TOKENS[:9])
    second, other = steps(olmoe, TOKENS[20:29])
    taken.off = False
    rows: dict[int, list[Any]] = {0: [], 1: []}
    caches = [steps(olmoe, TOKENS[:4])[1], steps(olmoe, TOKENS[20:24])[1]]
    for turn in range(5):
        for number, start in ((0, 4), (1, 24)):
            row, _ = steps(olmoe, [TOKENS[start + turn]], caches[number])
            rows[number].append(row)
    assert torch.equal(torch.cat(rows[0]), first[-5:]) and same(caches[0], one)
    assert torch.equal(torch.cat(rows[1]), second[-5:]) and same(caches[1], other)
    caches[0].crop(-3)
    again, _ = steps(olmoe, TOKENS[6:9], caches[0])
    assert torch.equal(again, first[-3:]) and same(caches[0], one)
    kept = caches[0].layers[0]
    kept.keys, kept.values = kept.keys.clone(), kept.values.clone()  # as a beam search does
    taken.off = True
    wanted, _ = steps(olmoe, TOKENS[9:12], one)
    taken.off = False
    assert torch.equal(steps(olmoe, TOKENS[9:12], caches[0])[0], wanted)


def test_a_changed_forward_is_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_step, "_HEADS", frozenset())
    report = package("olmoe", tmp_path).conmoe.fast_path
    pattern = r"the forward of OlmoeForCausalLM, [0-9a-f]{16}, is not on the list"
    assert re.fullmatch(pattern, report.around)
    assert not report.apart


def test_a_fingerprint_is_of_everything_below() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).eval()
    known = Fingerprint(module.modules())
    assert known.same()
    hook = module[0].register_forward_pre_hook(lambda *_: None)
    assert not known.same()
    hook.remove()
    assert known.same()
    module[1].running_mean = torch.zeros(2)
    assert not known.same()
    known = Fingerprint(module.modules())
    module[0].forward = module[0].forward
    assert not known.same()
    del module[0].forward
    assert known.same()
    module[1].train()
    assert not known.same()
    module[1].eval()
    first = module[0]
    module[0] = torch.nn.Linear(2, 2)
    assert not known.same()
    module[0] = first
    assert known.same()
    first.bias = None
    assert not known.same()
