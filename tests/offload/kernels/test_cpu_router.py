"""Routers by the operator against transformers' own modules, random weights, many tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1Gate
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.offload.kernels.cpu.bindings import operator
from conmoe_edge.offload.kernels.cpu.decoder_tables import RouterTable

ENGINE = operator()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="no compiler here")
HIDDEN, EXPERTS, CHOSEN, TOKENS = 64, 16, 4, 200

SIGMOID: dict[str, Any] = {"scores": "sigmoid", "narrow": False}
CASES: dict[str, tuple[type, str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_moe": (
        *(Qwen2MoeTopKRouter, "qwen2_moe", {"num_experts": EXPERTS, "norm_topk_prob": False}),
        {"normed": False, "narrow": True},
    ),
    "mixtral": (MixtralTopKRouter, "mixtral", {}, {"normed": True, "narrow": False}),
    "granitemoe": (
        *(GraniteMoeTopKRouter, "granitemoe", {}),
        {"scores": "top-softmax", "normed": False, "narrow": True},
    ),
    "gpt_oss": (
        *(GptOssTopKRouter, "gpt_oss", {}),
        {"scores": "top-softmax", "normed": False, "narrow": True},
    ),
    "hunyuan": (
        *(HunYuanMoEV1Gate, "hunyuan_v1_moe", {"num_experts": EXPERTS, "moe_topk": CHOSEN}),
        {"normed": True, "narrow": False, "exact": True},
    ),
    "ernie": (
        *(Ernie4_5_MoeTopKRouter, "ernie4_5_moe", {"moe_num_experts": EXPERTS, "moe_k": CHOSEN}),
        {"normed": True, "narrow": True, "exact": True, "least": 1e-12},
    ),
    "deepseek_v2": (
        *(DeepseekV2TopkRouter, "deepseek_v2"),
        {"n_routed_experts": EXPERTS, "topk_method": "greedy", "routed_scaling_factor": 1.5},
        {"normed": False, "narrow": False, "exact": True, "scaling": 1.5},
    ),
    "deepseek_v2, groups": (
        *(DeepseekV2TopkRouter, "deepseek_v2"),
        {
            **{"n_routed_experts": EXPERTS, "topk_method": "group_limited_greedy"},
            **{"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        },
        {
            **{"normed": False, "narrow": False, "exact": True, "scaling": 16.0},
            **{"groups": 4, "kept": 2},
        },
    ),
    "deepseek_v3": (
        *(DeepseekV3TopkRouter, "deepseek_v3"),
        {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        {
            **SIGMOID,
            **{"normed": True, "exact": True, "epsilon": 1e-20, "scaling": 2.5},
            **{"groups": 4, "kept": 2, "pairs": True},
        },
    ),
    "glm4_moe": (
        *(Glm4MoeTopkRouter, "glm4_moe"),
        {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        {**SIGMOID, "normed": False, "exact": True},
    ),
    "minimax_m2": (MiniMaxM2TopKRouter, "minimax_m2", {}, {**SIGMOID, "normed": True}),
    "lfm2_moe": (
        *(Lfm2MoeTopKRouter, "lfm2_moe"),
        {"num_experts": EXPERTS, "use_expert_bias": True, "routed_scaling_factor": 1.7},
        {
            **{"scores": "sigmoid", "normed": True, "narrow": True, "stepwise": True},
            **{"epsilon": 1e-6, "scaling": 1.7},
        },
    ),
    "phimoe": (
        *(PhimoeTopKRouter, "phimoe", {"num_experts_per_tok": 2, "router_jitter_noise": 0.1}),
        {"scores": "sparsemixer", "normed": False, "narrow": True, "jitter": 0.1},
    ),
}
WITH_ARGUMENT = ("minimax_m2", "lfm2_moe")  # the correction belongs to the block around the router


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(name: str, wide: bool) -> tuple[Any, RouterTable, tuple[Tensor, ...]]:
    """transformers' router, the operator's, and what the first takes beside activations."""
    kind, model_type, settings, arguments = CASES[name]
    common = {
        **{"hidden_size": HIDDEN, "num_experts_per_tok": CHOSEN},
        **{"num_local_experts": EXPERTS, "num_hidden_layers": 2},
    }
    config = AutoConfig.for_model(model_type, **{**common, **settings})
    module = kind(config).eval()
    exact = arguments.get("exact", False)
    fp32 = wide or name in ("ernie", "hunyuan")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    weight = module.wg.weight if name == "hunyuan" else module.weight
    format_ = torch.float32 if fp32 and exact else torch.bfloat16
    weight.data = (random(EXPERTS, HIDDEN) * 0.3).to(format_)
    bias = correction = None
    if getattr(module, "bias", None) is not None:
        bias = module.bias.data = random(EXPERTS, seed=1).bfloat16()
    extra: tuple[Tensor, ...] = ()
    if name in WITH_ARGUMENT:
        correction = random(EXPERTS, seed=2) * 0.2
        extra = (correction,)
    for owner in (module, getattr(module, "moe_statics", None)):
        if owner is not None and hasattr(owner, "e_score_correction_bias"):
            correction = random(EXPERTS, seed=2) * 0.05
            owner.e_score_correction_bias.data = correction.view_as(owner.e_score_correction_bias)
    assert ENGINE is not None
    matrix = ENGINE.prepare(quantise(weight.detach(), "plain"))
    assert matrix is not None
    chosen = 2 if name == "phimoe" else CHOSEN
    table = RouterTable(matrix, chosen, bias=bias, correction=correction, **arguments)
    return module, table, extra


def by_slot(slots: Tensor, gates: Tensor) -> dict[int, float]:
    return dict(zip(slots[0].tolist(), gates[0].tolist(), strict=True))


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_slots_and_gates(name: str, wide: bool) -> None:
    """Logits in bf16 may fall to the other side of a rounding; then gates and slots are those of the neighbour."""
    if wide and not CASES[name][3].get("exact"):
        pytest.skip("the logits of this one are those of a product in bf16")
    assert ENGINE is not None
    module, table, extra = case(name, wide)
    x = random(TOKENS, HIDDEN, seed=3).bfloat16()
    same = 0
    for row in x:
        with torch.no_grad():
            wanted = module(row.unsqueeze(0), *extra)
        logits, gates, slots = ENGINE.route(table, row.unsqueeze(0))
        assert logits.dtype == wanted[0].dtype or name == "granitemoe"
        assert gates.dtype == wanted[1].dtype
        near = 1e-5 if table.logits == torch.float32 else 2.0**-7
        assert torch.allclose(logits.float(), wanted[0].float(), rtol=near, atol=near)
        if not torch.allclose(logits.float(), wanted[0].float(), rtol=0, atol=1e-5):
            continue
        found, hoped = by_slot(slots, gates), by_slot(wanted[2], wanted[1])
        if set(found) != set(hoped):  # only where two are as good as each other
            assert table.logits == torch.bfloat16
            continue
        step = 2.0**-8 if gates.dtype == torch.bfloat16 else 1e-5
        for slot, gate in found.items():
            assert abs(gate - hoped[slot]) <= step * abs(hoped[slot]) + 1e-7
        same += 1
    assert same > TOKENS * 0.7


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2, groups"])
def test_groups_change_the_choice(name: str) -> None:
    """Otherwise the test above would not have seen them."""
    assert ENGINE is not None
    _, table, _ = case(name, False)
    _, other, _ = case(name, False)
    other._struct.groups = 1
    x = random(TOKENS, HIDDEN, seed=3).bfloat16()
    differ = sum(
        set(ENGINE.route(table, row.unsqueeze(0))[2][0].tolist())
        != set(ENGINE.route(other, row.unsqueeze(0))[2][0].tolist())
        for row in x
    )
    assert differ > TOKENS / 10


def test_sizes_that_do_not_go_together() -> None:
    assert ENGINE is not None
    matrix = ENGINE.prepare(quantise(random(EXPERTS, HIDDEN).bfloat16(), "plain"))
    assert matrix is not None
    for chosen, arguments in (
        (EXPERTS + 1, {}),
        (0, {}),
        (5, {"groups": 4, "kept": 1}),
        (2, {"groups": 3}),
        (2, {"groups": 4, "kept": 5}),
        (2, {"bias": random(EXPERTS)}),
        (2, {"correction": random(EXPERTS).bfloat16()}),
        (2, {"correction": random(EXPERTS + 1)}),
        (3, {"scores": "sparsemixer"}),
    ):
        with pytest.raises(ValueError):
            RouterTable(matrix, chosen, False, True, **arguments)  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_choose_slots_that_exist() -> None:
    assert ENGINE is not None
    for name in CASES:
        _, table, _ = case(name, False)
        x = random(1, HIDDEN).bfloat16()
        x[0, 3] = float("nan")
        _, gates, slots = ENGINE.route(table, x)
        assert gates.isnan().any()
        assert len(set(slots[0].tolist())) == table.chosen and int(slots.min()) >= 0
        assert int(slots.max()) < EXPERTS
