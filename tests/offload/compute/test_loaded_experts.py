"""Experts of a model that was left unchanged, computed where they were loaded: beside the same experts as records,
beside transformers, and beside plain products.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conmoe_edge.integrations import attach
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.experts import expert_forward, find_experts, part_names
from conmoe_edge.offload.compute.experts_forward import HANDLE
from conmoe_edge.offload.compute.loaded_experts import LoadedExperts, take_loaded_experts
from conmoe_edge.offload.compute.torch_backend import Arithmetic
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import tiny_model
from tests.hand_packages import identity, write_package, write_unchanged
from tests.offload.fastpath.single_tokens import random_parts, steps

pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")

TOKENS = [3 + 7 * i % 90 for i in range(40)]
PROMPT = torch.arange(3, 43)[None]
FAMILIES = (
    *("afmoe", "deepseek", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe"),
    *("flex_olmo", "glm4_moe", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "lfm2_moe"),
    *("mimo_v2_flash", "minimax", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe"),
    *("qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open"),
)
CPU = torch.device("cpu")


@pytest.fixture
def loaded() -> Iterator[Any]:
    models = []

    def load(folder: Path, **settings: Any) -> Any:
        model: Any = load_package(folder, device="cpu", **settings)
        models.append(model)
        return model

    yield load
    for model in models:
        model.conmoe.close()


def tiny(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return random_parts(tiny_model(name, dtype=dtype).eval())


def scores(model: Any, ids: Tensor = PROMPT, **settings: Any) -> Tensor:
    with torch.inference_mode():
        return model(ids, **settings).logits


def experts_of(model: Any) -> list[Any]:
    return [module for _, module in find_experts(model).values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_bits_as_a_package_of_records(name: str, tmp_path: Path, loaded: Any) -> None:
    plain = tiny(name)
    records = loaded(write_package(plain, tmp_path / "records", identity(plain)))
    unchanged = loaded(write_unchanged(plain, tmp_path / "unchanged"))
    one, other = (model.conmoe.fast_path for model in (records, unchanged))
    assert other.layers == one.layers and other.around == one.around
    assert all(isinstance(vars(one)["forward"], LoadedExperts) for one in experts_of(unchanged))
    for ids in (PROMPT, PROMPT[:, :7], PROMPT.view(4, 10)):  # many tokens, few, several at once
        assert torch.equal(scores(unchanged, ids), scores(records, ids))
    assert torch.equal(steps(unchanged, TOKENS)[0], steps(records, TOKENS)[0])
    assert other.live() == one.live()


def test_batches_with_padding_and_8_bits_of_keys(tmp_path: Path, loaded: Any) -> None:
    plain = tiny("qwen3_moe")
    folders = (
        write_package(plain, tmp_path / "records", identity(plain)),
        write_unchanged(plain, tmp_path / "unchanged"),
    )
    records, unchanged = map(loaded, folders)
    mask = torch.ones(2, 20).long()
    mask[0, :6] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    wanted = records.generate(PROMPT.view(2, 20), **settings)
    assert torch.equal(unchanged.generate(PROMPT.view(2, 20), **settings), wanted)
    records, unchanged = [loaded(folder, kv_precision="int8") for folder in folders]
    assert torch.equal(steps(unchanged, TOKENS)[0], steps(records, TOKENS)[0])


def test_threads_change_nothing(tmp_path: Path, loaded: Any) -> None:
    model = loaded(write_unchanged(tiny("olmoe"), tmp_path))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((scores(model), steps(model, TOKENS)[0]))
    finally:
        torch.set_num_threads(before)
    for prompt, single in found[1:]:
        assert torch.equal(prompt, found[0][0]) and torch.equal(single, found[0][1])


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "granitemoe"])
def test_beside_plain_products(name: str, tokens: int) -> None:
    """One layer's experts, token by token and slot by slot in fp64, by weights that nothing of ours has touched."""
    model = tiny(name)
    plain = tiny(name).double()
    take_loaded_experts(model, Arithmetic(CPU))
    module, reference = experts_of(model)[0], experts_of(plain)[0]
    assert isinstance(vars(module)["forward"], LoadedExperts)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 32, generator=generator).bfloat16()
    slots = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(tokens)])
    gates = torch.rand(tokens, 3, generator=generator)
    found = module(hidden, slots, gates)
    wanted = torch.zeros(tokens, 32, dtype=torch.float64)
    for token in range(tokens):
        for slot, gate in zip(slots[token].tolist(), gates[token].tolist(), strict=True):
            parts = {one: getattr(reference, one)[slot].detach() for one in part_names(reference)}
            row = expert_forward(reference, hidden[token].double()[None], parts)
            wanted[token] += gate * row[0]
    assert (found.double() - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_no_number_is_there_twice() -> None:
    model = tiny("olmoe")
    take_loaded_experts(model, Arithmetic(CPU))
    for module in experts_of(model):
        layer = getattr(module, HANDLE).experts(module)
        for number, expert in enumerate(layer.residency.resident(range(8))):
            assert set(expert.parts) == set(part_names(module))
            for name, part in expert.parts.items():
                assert part.data_ptr() == getattr(module, name)[number].data_ptr()
            up, down = expert.matrices
            assert (up.values, down.values) == (
                module.gate_up_proj[number].data_ptr(),
                module.down_proj[number].data_ptr(),
            )


def test_weights_changed_in_place_are_computed_with(tmp_path: Path, loaded: Any) -> None:
    model = loaded(write_unchanged(tiny("olmoe"), tmp_path / "one"))
    other = tiny("olmoe")
    for one in (model, other):
        with torch.no_grad():
            experts_of(one)[1].down_proj.mul_(2)
    wanted = loaded(write_unchanged(other, tmp_path / "other"))
    assert torch.equal(steps(model, TOKENS)[0], steps(wanted, TOKENS)[0])
    assert model.conmoe.fast_path.live()["layer"] == 3 * len(TOKENS)


def exchange_data(module: nn.Module) -> None:
    module.down_proj.data = (module.down_proj.detach() * 2).clone()  # pyright: ignore[reportCallIssue]


def exchange_parameter(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(module.down_proj.detach() * 2)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("exchange", [exchange_data, exchange_parameter])
@pytest.mark.parametrize("running", [False, True])
def test_exchanged_weights_go_transformers_way(
    exchange: Any, running: bool, tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first token, and when tokens have gone by them for long; prompts as well."""
    folder = write_unchanged(tiny("olmoe"), tmp_path)
    model = loaded(folder)
    with monkeypatch.context() as patch:
        patch.setattr(attach, "take_loaded_experts", lambda *_: None)
        wanted = loaded(folder)
    cache = steps(model, TOKENS[:9])[1] if running else None
    held = weakref.ref(getattr(experts_of(model)[1], HANDLE).experts(experts_of(model)[1]))
    before = scores(model)
    for one in (model, wanted):
        exchange(experts_of(one)[1])
    after = scores(model)
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    near(after, scores(wanted))
    served = model.conmoe.fast_path.served
    counts = served.layers, served.blocks
    near(steps(model, TOKENS)[0], steps(wanted, TOKENS)[0])
    # The first token computes both ways again, in the layer that has lost its experts alone.
    assert served.layers - counts[0] == 2 * len(TOKENS)
    assert served.blocks - counts[1] >= len(TOKENS) - 1
    if running:
        steps(model, TOKENS[:2], cache)
    gc.collect()
    assert held() is None  # nothing keeps the old weights


def near(found: Tensor, wanted: Tensor) -> None:
    """As near as two orders of sums are; near ties of a router may differ, so most of them."""
    far = (found - wanted).float().abs().flatten()
    assert far.median() <= 0.02 * wanted.float().abs().max()


def test_hooks_and_another_forward_are_called(tmp_path: Path, loaded: Any) -> None:
    model = loaded(write_unchanged(tiny("olmoe"), tmp_path))
    wanted = steps(model, TOKENS[:9])[0]
    module, seen = experts_of(model)[1], []
    hook = module.register_forward_hook(lambda *call: seen.append(call[2]))
    again = steps(model, TOKENS[:9])[0]
    assert len(seen) >= 9
    near(again, wanted)
    hook.remove()
    assert torch.equal(steps(model, TOKENS[:9])[0], wanted)
    own = module.forward
    seen.clear()

    def another(*given: Any) -> Tensor:
        seen.append(given)
        return own(*given)

    module.forward = another
    near(steps(model, TOKENS[:9])[0], wanted)
    assert len(seen) >= 10  # the prompt and every token
    module.forward = own
    assert torch.equal(steps(model, TOKENS[:9])[0], wanted)


def test_a_module_in_training_is_transformers_own() -> None:
    model = tiny("olmoe")
    take_loaded_experts(model, Arithmetic(CPU))
    module = experts_of(model)[0].train()
    hidden = torch.randn(5, 32).bfloat16()
    slots, gates = torch.tensor([[0, 1, 2]] * 5), torch.full((5, 3), 0.3)
    module(hidden, slots, gates).sum().backward()
    assert module.gate_up_proj.grad is not None and module.down_proj.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("gpt_oss", torch.bfloat16, "GptOssExperts keeps its weights transposed, [in, out]"),
        ("olmoe", torch.float32, "OlmoeExperts keeps its weights in float32"),
        ("olmoe", torch.float16, "OlmoeExperts keeps its weights in float16"),
    ],
)
def test_what_is_left_to_transformers_says_why(
    name: str, dtype: torch.dtype, reason: str, tmp_path: Path, loaded: Any
) -> None:
    plain = tiny(name, dtype)
    model = loaded(write_unchanged(plain, tmp_path))
    for module in experts_of(model):
        assert getattr(module, HANDLE).reason == reason
        assert "forward" not in vars(module)
    report = model.conmoe.fast_path
    if dtype == torch.bfloat16:
        assert [one.live for one in report.layers] == ["block"] * 3
        assert f"its experts are transformers': {reason}" in report.summary
    else:
        word = str(dtype).removeprefix("torch.")
        assert report.summary == f"transformers' own steps: the model computes in {word}"
    if dtype == torch.float32:
        assert torch.equal(scores(model), scores(plain))


def test_without_an_operator_they_are_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from conmoe_edge.offload.compute import loaded_experts

    monkeypatch.setattr(loaded_experts, "operator", lambda: None)
    model = tiny("olmoe")
    take_loaded_experts(model, Arithmetic(CPU))
    module = experts_of(model)[0]
    assert getattr(module, HANDLE).reason == "there is no compiled operator"
    assert "forward" not in vars(module)


def test_a_model_that_is_dropped_leaves_nothing(tmp_path: Path, loaded: Any) -> None:
    model: Any = load_package(write_unchanged(tiny("olmoe"), tmp_path), device="cpu")
    steps(model, TOKENS[:3])
    weight = weakref.ref(experts_of(model)[0].down_proj)
    model.conmoe.close()
    steps(model, TOKENS[:3])  # its weights are the model's own: closing takes none away
    del model
    gc.collect()
    assert weight() is None
