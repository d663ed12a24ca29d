"""The rule for an expert's products, and every path it chooses from against plain products."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.forms import SCALE, factored_sizes
from conmoe_edge.checkpoint.format.records import decode, matrix_of
from conmoe_edge.compress.solvers.low_rank import factor
from conmoe_edge.model.experts import expert_forward, find_experts, part_names, through_expert
from conmoe_edge.offload.compute import torch_backend as arithmetic
from conmoe_edge.offload.compute.torch_backend import (
    MANY_ROWS,
    Arithmetic,
    Machine,
    Scratch,
    compute_dtype,
)
from conmoe_edge.offload.kernels.cpu.reference import product
from conmoe_edge.offload.storage.stored_expert import StoredExpert
from tests.families import tiny_model

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = Machine("cpu", native_bf16=False)
CPU = torch.device("cpu")
EXACT = ("source", "lowrank")  # computed by torch in the format of the weights
MIXED = ("q2-q3", "q3-q4", "q4-int8", "mxfp4-plain", "plain-int8")
"""Of gate and up, and of down."""
MODELS = ("olmoe", "gpt_oss")  # plain; transposed, biased, with a gate of its own


def test_many_rows_are_widened_without_bf16_instructions() -> None:
    assert compute_dtype(PLAIN, BF16, BF16, MANY_ROWS) == FP32
    assert compute_dtype(PLAIN, BF16, BF16, MANY_ROWS - 1) == BF16


def test_processors_with_bf16_and_gpus_compute_as_loaded() -> None:
    for machine, rows in itertools.product(
        (Machine("cpu", True), Machine("cuda", True)), (1, 1000)
    ):
        assert compute_dtype(machine, BF16, BF16, rows) == BF16
        assert compute_dtype(machine, FP16, FP16, rows) == FP16


def test_a_model_in_fp32_computes_in_fp32() -> None:
    for machine in (PLAIN, Machine("cpu", True), Machine("cuda", True)):
        assert compute_dtype(machine, FP32, BF16, 1) == FP32


def test_scratch_is_used_again_and_aligned() -> None:
    scratch = Scratch(CPU)
    first = scratch.matrix(7, 5, FP32).fill_(1)
    assert first.data_ptr() % 64 == 0
    with torch.inference_mode():
        again = scratch.matrix(5, 7, BF16)
        again.fill_(2)
    assert again.data_ptr() == first.data_ptr()
    assert scratch.matrix(5, 7, BF16).add_(1).sum() == 3 * 35  # outside of inference mode again


@pytest.fixture(params=["operator", "torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled operator, and as on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(arithmetic, "operator", lambda: None)
        monkeypatch.setattr("conmoe_edge.offload.storage.stored_expert.operator", lambda: None)
    elif arithmetic.operator() is None:
        pytest.skip("no compiler here")
    return request.param


def stored_experts(name: str, precision: str, dtype: torch.dtype) -> tuple[Any, list[StoredExpert]]:
    """An experts module, and its first experts as records of this precision hold them; of two with a dash gate and up
    have the first, down the second.
    """
    from conmoe_edge.checkpoint.format.quantise import best_kind, quantise

    torch.manual_seed(3)
    up, _, down = precision.partition("-")
    sizes = {}
    if up == "mxfp4" or down:  # whole blocks, and matrices that look alike however they lie
        sizes = {"intermediate_size": 64, "hidden_size": 64, "head_dim": 16}
    model = tiny_model(name, dtype=dtype, **sizes)
    module: Any = next(iter(find_experts(model).values()))[1]
    found = []
    for expert in range(4):
        parts = {n: getattr(module, n)[expert].detach() for n in part_names(module)}
        held: dict[str, torch.Tensor] = {}
        for n, part in parts.items():
            own = down if down and n.startswith("down") else up
            if own in ("source", "plain") or n.endswith("_bias"):
                held[n] = part.contiguous()
                continue
            weight = part.T if module.is_transposed else part
            if own == "lowrank":
                sizes = factored_sizes(*weight.shape)
                for part_name, factor_ in (
                    factor(weight, torch.eye(weight.shape[1]), *sizes).named(n).items()
                ):
                    held[part_name] = factor_.to(dtype) if factor_.is_floating_point() else factor_
                continue
            kind = best_kind(*weight.shape, own)
            matrix = quantise(weight, kind)
            held[n], held[n + SCALE] = matrix.values, matrix.scales
        found.append(StoredExpert(held))
    return module, found


def by_the_operator(module: Any, expert: StoredExpert, hidden: torch.Tensor) -> torch.Tensor:
    """What the operator is meant to compute, with activations rounded beside quantised weights."""

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        y = product(matrix_of(expert.parts, name), x).float()
        bias = expert.parts.get(f"{name}_bias")
        return y if bias is None else y + bias.float()

    return through_expert(module, hidden.float(), project)


def reference(module: Any, expert: StoredExpert, hidden: torch.Tensor) -> torch.Tensor:
    parts = decode(expert.parts, FP32, module.is_transposed)
    return expert_forward(module, hidden.float(), {n: t.float() for n, t in parts.items()})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["source", "int8", "int4", "mxfp4", "lowrank", *MIXED])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rows", [1, 3, MANY_ROWS + 2])
def test_every_path_is_the_plain_product(
    how: str, name: str, precision: str, dtype: torch.dtype, rows: int
) -> None:
    module, experts = stored_experts(name, precision, dtype)
    hidden = torch.randn(rows, module.config.hidden_size)
    hidden = hidden.to(dtype)
    compute = Arithmetic(CPU)
    close = 2e-5 if dtype == FP32 and (precision in EXACT or how == "operator") else 0.03
    for expert in experts:
        rounded = expert.quantised and rows < MANY_ROWS and expert.suits_operator(module, dtype)
        expected = (by_the_operator if rounded else reference)(module, expert, hidden)
        got = compute.rows(module, expert, hidden)
        assert got.dtype == FP32
        assert (got - expected).abs().max() <= close * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["source", "int8", "int4", "mxfp4", "lowrank", "q3-q4"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_experts_together_are_experts_alone(
    how: str, name: str, precision: str, dtype: torch.dtype
) -> None:
    """To the last bit: what is resident decides who computes together, and must not show."""
    module, experts = stored_experts(name, precision, dtype)
    hidden = torch.randn(1, module.config.hidden_size).to(dtype)
    compute = Arithmetic(CPU)
    together = compute.one_token(module, experts, hidden)
    for position, expert in enumerate(experts):
        alone = compute.one_token(module, [expert], hidden)
        assert torch.equal(alone[0], together[position])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["source", "int8", "int4", "mxfp4", "lowrank", "q3-q4"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_experts_of_a_prompt_in_one_call_or_several(
    how: str, name: str, precision: str, dtype: torch.dtype
) -> None:
    """To the same bits; and what they add up to."""
    module, experts = stored_experts(name, precision, dtype)
    tokens = MANY_ROWS + 5
    hidden = torch.randn(tokens, module.config.hidden_size).to(dtype)
    compute, routed = Arithmetic(CPU), []
    for count in (tokens, 1, 9, 3)[: len(experts)]:
        routed.append((torch.randperm(tokens)[:count].sort().values, torch.rand(count)))
    experts = experts[: len(routed)]
    together, apart = torch.zeros(2, *hidden.shape)
    compute.add_all(module, experts, hidden, routed, together)
    expected = torch.zeros(hidden.shape)
    for expert, (rows, weights) in zip(experts, routed, strict=True):
        compute.add_all(module, [expert], hidden, [(rows, weights)], apart)
        right = by_the_operator if expert.quantised and how == "operator" else reference
        expected[rows] += right(module, expert, hidden[rows]) * weights.unsqueeze(1)
    assert torch.equal(together, apart)
    assert (together - expected).norm() <= 0.02 * expected.norm()


def test_mixed_precisions_together(how: str) -> None:
    module, eights = stored_experts("olmoe", "int8", BF16)
    _, fours = stored_experts("olmoe", "int4", BF16)
    mixed = [eights[0], fours[1], eights[2], fours[3]]
    hidden = torch.randn(1, module.config.hidden_size).bfloat16()
    compute = Arithmetic(CPU)
    together = compute.one_token(module, mixed, hidden)
    for position, expert in enumerate(mixed):
        assert torch.equal(compute.one_token(module, [expert], hidden)[0], together[position])


def test_the_report_says_what_computes(how: str) -> None:
    assert Arithmetic(CPU).name.startswith("native" if how == "operator" else "torch")
