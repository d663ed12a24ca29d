"""A decoder layer in one call or two: the same bits as transformers' steps, and only where it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.compat import cache_argument
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.experts import find_experts
from conmoe_edge.offload.compute.cpu_layer import CpuLayer
from conmoe_edge.offload.fastpath import kv_cache
from conmoe_edge.offload.fastpath.decoder_layer import FusedLayer
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import tiny_model
from tests.hand_packages import identity, write_package
from tests.offload.fastpath.single_tokens import (
    IDS,
    layers_of_transformers,
    modules_behind,
    of_family,
    steps,
)

USUAL = (
    *("deepseek", "dots1", "glm4_moe", "granitemoe", "granitemoeshared", "hunyuan_v1_moe"),
    *("minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open"),
)
OTHERS = ("minimax",)

pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")


@pytest.fixture
def package(tmp_path: Path) -> Any:
    """A loaded package with nothing removed."""
    model = tiny_model("olmoe", dtype=torch.bfloat16)
    return load_package(write_package(model, tmp_path / "package", identity(model)))


def modules_of(model: Any) -> list[Any]:
    return modules_behind(model, FusedLayer)


def layers_of(model: Any) -> list[FusedLayer]:
    return [module.forward for module in modules_of(model)]


@pytest.mark.parametrize("name", USUAL)
def test_the_same_bits_as_transformers(name: str) -> None:
    model = of_family(name)
    with layers_of_transformers():
        wanted, _ = steps(model, [3, 1, 4, 1, 5])
    found, _ = steps(model, [3, 1, 4, 1, 5])
    assert [one.verified for one in layers_of(model)] == [True] * model.config.num_hidden_layers
    assert torch.equal(found, wanted)


def test_no_token_of_a_later_conversation_takes_the_long_way(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the first behind a prompt nor one for which the cache has to grow."""
    monkeypatch.setattr(kv_cache, "STEP_TOKENS", 4)
    with layers_of_transformers():
        wanted, _ = steps(package, [3, 1, 4, 1, 5, 9])
    steps(package, [3])  # sees that both ways agree
    calls = []
    own = type(operator()).decoder

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return own(*arguments)

    monkeypatch.setattr(type(operator()), "decoder", counted)
    found, _ = steps(package, [3, 1, 4, 1, 5, 9])
    assert torch.equal(found, wanted) and len(calls) == 3 * 6


@pytest.mark.parametrize("name", OTHERS)
def test_another_layer_is_left_alone(name: str) -> None:
    assert not layers_of(of_family(name))


def test_resident_experts_are_the_second_call(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with layers_of_transformers():
        wanted, _ = steps(package, [3, 1, 4, 1, 5])
    found, cache = steps(package, [3, 1, 4, 1, 5])
    assert [one.verified for one in layers_of(package)] == [True] * 3
    assert torch.equal(found, wanted)
    before = package.conmoe.stats().hits

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model's own block was called")

    for layer in modules_of(package):
        monkeypatch.setattr(layer.mlp, "forward", never)
        # Of the class: one of a module's own is noticed, and called.
        monkeypatch.setattr(type(layer.mlp.experts), "forward", never)
    steps(package, [2], cache)
    assert package.conmoe.stats().hits - before == 3 * package.config.num_experts_per_tok


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mixtral", {}), ("olmoe", {}), ("qwen3_moe", {"mlp_only_layers": []})],
)
def test_the_whole_layer_is_one_call(
    name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = tiny_model(name, dtype=torch.bfloat16, **changes)
    model: Any = load_package(write_package(plain, tmp_path / "package", identity(plain)))
    with layers_of_transformers():
        wanted, _ = steps(model, [3, 1, 4, 1, 5, 9])
    found, cache = steps(model, [3, 1, 4, 1, 5])
    assert [one.verified for one in layers_of(model)] == [True] * len(layers_of(model)) != []

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("another call than the one")

    for call in ("block", "attention", "route", "layer", "few_rows"):
        monkeypatch.setattr(type(operator()), call, never)
    last, _ = steps(model, [9], cache)
    assert torch.equal(torch.cat([found, last]), wanted)


@pytest.mark.parametrize("slots", [1, 3, 5, 12, 23])
@pytest.mark.parametrize("watched", [False, True])
def test_prototypes_that_are_not_all_resident(
    slots: int, watched: bool, tmp_path: Path, package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one call ends before the experts where one is absent; with a watched router it is two calls anyway."""
    tokens = [3 + 5 * i % 80 for i in range(30)]
    wanted, _ = steps(package, tokens)
    model: Any = load_package(tmp_path / "package", slots=(slots,))
    layers = modules_of(model)
    if watched:
        for layer in layers:
            layer.mlp.gate.register_forward_hook(lambda *call: None)
    answers: list[bool] = []
    call = "output" if watched else "decoder"
    own = getattr(CpuLayer, call)

    def noted(*args: Any, **kwargs: Any) -> Any:
        answers.append((found := own(*args, **kwargs)) is not None)
        return found

    found, cache = steps(model, tokens[:5])
    assert [one.verified for one in layers_of(model)] == [True] * 3
    monkeypatch.setattr(CpuLayer, call, noted)
    for layer in layers:  # the model's own block is not asked
        monkeypatch.setattr(layer.mlp, "forward", None)
    rest, _ = steps(model, tokens[5:], cache)
    assert torch.equal(torch.cat([found, rest]), wanted)
    assert len(answers) == 3 * len(tokens[5:])
    assert any(answers) == (slots >= 12) and not all(answers)
    assert model.conmoe.stats().misses > 0


def test_a_forward_that_fails_leaves_the_cache_as_it_was(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = steps(package, [3, 1, 4, 1, 5])
    _, cache = steps(package, [3, 1, 4, 1])
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no memory")

        patch.setattr(modules_of(package)[2].forward, "_compute", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            steps(package, [5], cache)
    assert {layer.get_seq_length() for layer in cache.layers} == {IDS.shape[1] + 4}
    found, _ = steps(package, [5], cache)
    assert torch.equal(found[0], wanted[-1])


@pytest.mark.parametrize("part", ["mlp", "mlp.gate", "mlp.experts", "self_attn", "input_layernorm"])
def test_a_part_that_is_watched_is_called(package: Any, part: str) -> None:
    wanted, _ = steps(package, [3, 1, 4, 1, 5])
    seen = []
    module = modules_of(package)[1].get_submodule(part)
    hook = module.register_forward_hook(lambda *call: seen.append(call))
    found, _ = steps(package, [3, 1, 4, 1, 5])
    calls = len(seen)
    assert calls in (6, 7), "a token that tries the operator is computed twice"
    assert torch.equal(found, wanted)
    hook.remove()
    again, _ = steps(package, [3, 1, 4, 1, 5])
    assert len(seen) == calls and torch.equal(again, wanted)


def test_a_call_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_family("olmoe")
    with layers_of_transformers():
        wanted, _ = steps(model, [3, 1, 4, 1, 5])
    own = type(operator()).block

    def wrong(*arguments: Any) -> Any:
        summed, normed = own(*arguments)
        return summed * 1.01, normed

    monkeypatch.setattr(type(operator()), "block", wrong)
    found, _ = steps(model, [3, 1, 4, 1, 5])
    assert [one.verified for one in layers_of(model)] == [False] * 3
    assert torch.equal(found, wanted)


def test_closed_is_closed(package: Any) -> None:
    _, cache = steps(package, [3, 1, 4, 1, 5])
    package.conmoe.close()
    with pytest.raises(Exception, match="not loaded"):
        steps(package, [2], cache)


def test_router_logits_and_hidden_states_are_handed_out(package: Any) -> None:
    _, cache = steps(package, [3, 1, 4, 1, 5])
    with torch.inference_mode():
        out = package(
            torch.tensor([[2]]),
            **cache_argument(package, cache),
            output_router_logits=True,
            output_hidden_states=True,
        )
    assert len(out.router_logits) == 3 and len(out.hidden_states) == 4
    cache.crop(-1)
    with layers_of_transformers(), torch.inference_mode():
        wanted = package(
            torch.tensor([[2]]),
            **cache_argument(package, cache),
            output_router_logits=True,
            output_hidden_states=True,
        )
    assert torch.equal(out.logits, wanted.logits)
    for ours, theirs in zip(out.hidden_states, wanted.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(out.router_logits, wanted.router_logits, strict=True):
        assert torch.equal(ours, theirs)


def test_every_layer_has_experts_in_the_package(package: Any) -> None:
    assert len(find_experts(package)) == len(layers_of(package)) == 3
