"""Packages with dense weights in fewer bits, and bf16 models with fast products, in every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from hand_packages import identity, thirds, write_package
from plain_products import without_operator
from torch import nn

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.checkpoint.format.quantise import Matrix, quantise
from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import PackageError, UsageError
from conmoe_edge.integrations.dense_weights import finish_dense
from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.linears import dense_forms, quantisable_weights
from conmoe_edge.offload.compute.fused_embedding import QuantisedEmbedding
from conmoe_edge.offload.compute.fused_linear import DenseProducts, FusedLinear
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.kernels.cpu.reference import product

NAMES = [family.model_type for family in FAMILIES]
PLENTY = (1000,)
PROMPT = torch.arange(5, 25)[None]


WIDER: dict[str, dict[str, Any]] = {
    "olmoe": {"head_dim": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},  # biases of q, k and v
    "qwen3_moe": {"intermediate_size": 64},  # norms of q and k, a dense layer
    "deepseek_v3": {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "head_dim": 32}
    | {"qk_nope_head_dim": 32, "v_head_dim": 32, "intermediate_size": 64},
}
"""Families whose matrices have whole tiles of 64 rows."""


def wider(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    sizes = {"vocab_size": 128, "hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 64}
    return tiny_model(name, dtype=dtype, **{**sizes, **WIDER[name], **more})


def logits(model: Any, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def tokens(model: Any) -> list[int]:
    made = model.generate(PROMPT[:, :9], max_new_tokens=8, do_sample=False, pad_token_id=0)
    return made[0].tolist()


def dequantised(model: Any, forms: Any) -> dict[str, Matrix]:
    """Leave the model the numbers that its forms leave of its weights, in plain layers; as they are stored."""
    made = {name: quantise(model.get_parameter(name), kind) for name, kind in forms.items()}
    with torch.no_grad():
        for name, matrix in made.items():
            weight = model.get_parameter(name)
            weight.copy_(matrix.dequantise(weight.dtype))
    return made


def as_the_operator(model: Any, made: dict[str, Matrix], head: str = "") -> None:
    """Tokens come out of these layers as the operator computes them; ``head`` is tied to the table."""
    for name, matrix in made.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer = model.get_submodule(head) if head and isinstance(layer, nn.Embedding) else layer
        if isinstance(layer, nn.Embedding):
            continue

        def forward(x: Any, matrix: Any = matrix, bias: Any = layer.bias) -> Any:
            y = product(matrix, x.flatten(0, -2)).to(x.dtype).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias

        layer.forward = forward


@pytest.mark.parametrize("name", NAMES)
def test_int8_runs_as_the_weights_that_it_stands_for(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    runs_as_what_it_stands_for(plain, dense_forms(quantisable_weights(plain), "int8"), tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "tied"),
    [
        *[("olmoe", "q4", True), ("olmoe", "q6", False), ("qwen2_moe", "q4", False)],
        *[("qwen3_moe", "q6", True), ("deepseek_v3", "q4", False)],
    ],
)
def test_few_bits_run_as_the_weights_that_they_stand_for(
    name: str, kind: str, tied: bool, tmp_path: Path
) -> None:
    plain = wider(name, tie_word_embeddings=tied)
    forms = dense_forms(quantisable_weights(plain), kind)
    assert kind in forms.values() and forms["model.embed_tokens.weight"] == "q6"
    assert all(one == "int8" for key, one in forms.items() if "kv_b_proj" in key)
    runs_as_what_it_stands_for(plain, forms, tmp_path)


def runs_as_what_it_stands_for(plain: Any, forms: dict[str, Kind], folder: Path) -> None:
    write_package(plain, folder / "package", identity(plain), in_int8=forms)
    model = load_package(folder / "package", device="cpu", slots=PLENTY, context=64)
    made = {path for path, one in model.named_modules() if isinstance(one, FusedLinear)}
    tables = {path for path, one in model.named_modules() if isinstance(one, QuantisedEmbedding)}
    tied = {"lm_head"} if plain.config.tie_word_embeddings else set()
    assert made | tables == {key.removesuffix(".weight") for key in forms} | tied
    for key, kind in forms.items():
        layer: Any = model.get_submodule(key.removesuffix(".weight"))
        formats = ("int8", "bfloat16") if kind == "int8" else ("uint8", "uint8")
        assert (layer.weight.dtype, layer.weight_scale.dtype) == tuple(
            getattr(torch, one) for one in formats
        )
    assert model.dtype == plain.dtype
    stored, right = dequantised(plain, forms), plain
    with without_operator():
        by_torch = logits(load_package(folder / "package", device="cpu", slots=PLENTY, context=64))
    torch.testing.assert_close(by_torch, logits(right), rtol=1e-3, atol=2e-4)
    if DenseProducts(Machine.here(torch.device("cpu"))).operator is not None:
        as_the_operator(right, stored, "".join(tied))
    for ids in (PROMPT[:, :3], PROMPT):
        torch.testing.assert_close(logits(model, ids), logits(right, ids), rtol=1e-3, atol=2e-4)


def test_routers_and_norms_keep_their_numbers() -> None:
    for name in NAMES:
        names = quantisable_weights(tiny_model(name))
        assert names and not any("norm" in key for key in names)
        assert not any(".experts." in key for key in names)
        assert not any(
            key.endswith((".gate.weight", ".router.weight", ".wg.weight", ".router.gate.weight"))
            for key in names
        )
    found = quantisable_weights(tiny_model("olmoe"))
    assert "lm_head.weight" in found and found["model.embed_tokens.weight"].looked_up
    tied = quantisable_weights(tiny_model("olmoe", tie_word_embeddings=True))
    assert "lm_head.weight" not in tied and "model.embed_tokens.weight" in tied


def test_a_table_that_does_more_than_look_up_is_left_alone() -> None:
    model = tiny_model("olmoe")
    model.model.embed_tokens.max_norm = 1.0
    assert "model.embed_tokens.weight" not in quantisable_weights(model)

    class Scaled(nn.Embedding):
        pass

    model.model.embed_tokens = Scaled(96, 32)
    assert "model.embed_tokens.weight" not in quantisable_weights(model)


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    plain = wider("olmoe", tie_word_embeddings=True)
    folder = write_package(
        plain, tmp_path / "one", identity(plain), in_int8={"model.embed_tokens.weight": "q4"}
    )
    model: Any = load_package(folder, device="cpu", slots=PLENTY, context=64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    table = model.get_input_embeddings()
    assert model.resize_token_embeddings(128) is table
    with pytest.raises(UsageError, match="cannot become 160 tokens"):
        model.resize_token_embeddings(160)
    for wrong in (-1, 128):
        with pytest.raises(IndexError):
            table(torch.tensor([[3, wrong]]))
    model.lm_head.weight = nn.Parameter(torch.zeros(128, 64))
    with pytest.raises(UsageError, match="was replaced"):
        logits(model)


def test_scales_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    plain = wider("olmoe")
    name = "model.layers.1.self_attn.q_proj.weight"
    folder = write_package(plain, tmp_path / "one", identity(plain), in_int8={name: "q6"})
    file = folder / "dense-00001-of-00001.safetensors"
    entry = CheckpointIndex.open(folder).tensors[name + DENSE_SCALE]
    data = bytearray(file.read_bytes())
    data[entry.offset : entry.offset + 2] = b"\xc0\x7f"
    file.write_bytes(data)
    with pytest.raises(PackageError, match=r"q_proj\.weight_scale holds NaN"):
        load_package(folder, device="cpu", slots=PLENTY, context=64)


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
        held = [*model.parameters(), *(t for n, t in model.named_buffers() if "scale" in n)]
        sizes.append(sum(t.numel() * t.element_size() for t in held))
    saved = sum(one.rows * one.columns - 2 * one.rows for one in names.values())
    assert sizes[1] - sizes[0] == saved


def test_a_package_of_another_model_is_refused(tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    name = "model.layers.0.mlp.gate.weight"
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
