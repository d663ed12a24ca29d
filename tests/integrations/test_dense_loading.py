"""Packages with dense weights in int8, and bf16 models with fast products, in every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from hand_packages import identity, thirds, write_package
from torch import nn

from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.dense_weights import finish_dense
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.linears import quantisable_weights
from conmoe_edge.offload.compute.fused_linear import DenseProducts, FusedLinear
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.kernels.cpu.reference import rounded

NAMES = [family.model_type for family in FAMILIES]
PLENTY = (1000,)
PROMPT = torch.arange(5, 25)[None]


def logits(model: Any, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def tokens(model: Any) -> list[int]:
    made = model.generate(PROMPT[:, :9], max_new_tokens=8, do_sample=False, pad_token_id=0)
    return made[0].tolist()


def dequantised(model: Any, names: Any) -> Any:
    """The same model with the numbers that int8 leaves of its weights, in plain layers."""
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight.copy_(quantise(weight, "int8").dequantise(weight.dtype))
    return model


def round_inputs(model: Any, names: Any) -> None:
    """Few tokens come to these layers as the operator takes them beside int8."""
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        matrix = quantise(layer.weight.detach(), "int8")
        layer.register_forward_pre_hook(
            lambda _, inputs, matrix=matrix: (rounded(inputs[0], matrix).to(inputs[0].dtype),)
        )


@pytest.mark.parametrize("name", NAMES)
def test_int8_runs_as_the_weights_that_it_stands_for(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    names = quantisable_weights(plain)
    folder = write_package(plain, tmp_path / "package", identity(plain), in_int8=names)
    model = load_package(folder, device="cpu", slots=PLENTY, context=64)
    made = {path for path, one in model.named_modules() if isinstance(one, FusedLinear)}
    assert made == {key.removesuffix(".weight") for key in names}
    for path in made:
        layer: Any = model.get_submodule(path)
        assert layer.weight.dtype == torch.int8 and layer.weight_scale.dtype == torch.bfloat16
    right = dequantised(plain, names)
    torch.testing.assert_close(logits(model), logits(right), rtol=1e-3, atol=1e-4)
    if DenseProducts(Machine.here(torch.device("cpu"))).operator is not None:
        round_inputs(right, names)
    few = PROMPT[:, :3]
    torch.testing.assert_close(logits(model, few), logits(right, few), rtol=1e-3, atol=1e-4)


def test_routers_embeddings_and_tied_heads_keep_their_numbers() -> None:
    for name in NAMES:
        names = quantisable_weights(tiny_model(name))
        assert names and not any("embed" in key or "norm" in key for key in names)
        assert not any(".experts." in key for key in names)
        assert not any(
            key.endswith((".gate.weight", ".router.weight", ".wg.weight", ".router.gate.weight"))
            for key in names
        )
    assert "lm_head.weight" in quantisable_weights(tiny_model("olmoe"))
    tied = quantisable_weights(tiny_model("olmoe", tie_word_embeddings=True))
    assert "lm_head.weight" not in tied


def test_renamed_and_fused_weights_are_left_alone() -> None:
    model = tiny_model("olmoe")
    own = {key: key for key in quantisable_weights(model)}
    first, second, third, *_ = own
    renamed = {f"old.{first}" if key == first else key: key for key in own}
    assert set(quantisable_weights(model, renamed)) == set(own) - {first}
    fused = {**own, "half": second}
    assert set(quantisable_weights(model, fused)) == set(own) - {second}
    without = {key: target for key, target in own.items() if key != third}
    assert set(quantisable_weights(model, without)) == set(own) - {third}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_tokens_whatever_is_resident(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = tiny_model("qwen2_moe", dtype=dtype)
    names = quantisable_weights(plain)
    folder = write_package(plain, tmp_path / "package", thirds(plain), in_int8=names)
    found = [tokens(load_package(folder, device="cpu", slots=(n,), context=64)) for n in (1, 3, 99)]
    assert found[0] == found[1] == found[2]


def test_memory_counts_int8_as_it_is(tmp_path: Path) -> None:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    names = quantisable_weights(plain)
    sizes = []
    for number, chosen in enumerate((names, ())):
        folder = write_package(plain, tmp_path / str(number), identity(plain), in_int8=chosen)
        model: Any = load_package(folder, device="cpu", slots=PLENTY)
        sizes.append(sum(t.numel() * t.element_size() for t in model.parameters()))
    saved = sum(rows * columns - 2 * rows for rows, columns in names.values())
    assert sizes[1] - sizes[0] == saved


def test_a_package_of_another_model_is_refused(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    name = "model.embed_tokens.weight"
    folder = write_package(plain, tmp_path / "package", identity(plain), in_int8=[name])
    with pytest.raises(PackageError, match="does not match"):
        load_package(folder, device="cpu", slots=PLENTY)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss", "lfm2_moe", "minimax"])
def test_fast_bf16_products_stay_within_rounding(name: str) -> None:
    right = tiny_model(name, dtype=torch.bfloat16)
    fast = copy.deepcopy(right)
    exact = logits(copy.deepcopy(right).float())
    count = sum(type(one) is nn.Linear for one in fast.modules())
    finish_dense(fast, DenseProducts(Machine("cpu", native_bf16=False)))
    assert sum(isinstance(one, FusedLinear) for one in fast.modules()) == count
    assert not any(type(one) is nn.Linear for one in fast.modules())
    usual = (logits(right) - exact).abs().mean()
    assert (logits(fast) - exact).abs().mean() <= 1.5 * usual + 1e-3
    assert fast.get_output_embeddings() is fast.lm_head


def test_what_is_left_to_transformers() -> None:
    old = DenseProducts(Machine("cpu", native_bf16=False))
    torch_s = DenseProducts(Machine("cpu", native_bf16=True), native=False)
    for model, products in (
        (tiny_model("olmoe"), old),  # fp32
        (tiny_model("olmoe", dtype=torch.bfloat16), torch_s),
    ):
        finish_dense(model, products)
        assert not any(isinstance(one, FusedLinear) for one in model.modules())


def test_a_tied_head_stays_tied() -> None:
    model = tiny_model("olmoe", dtype=torch.bfloat16, tie_word_embeddings=True)
    before = logits(model)
    finish_dense(model, DenseProducts(Machine("cpu", native_bf16=False)))
    assert isinstance(model.lm_head, FusedLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), before, rtol=0.05, atol=0.05)
