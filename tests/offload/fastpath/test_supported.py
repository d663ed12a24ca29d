"""The proof of the list: every class on it takes more than 64 tokens both ways.

Against transformers' own model, untouched: no further from the same model in fp32 than transformers' bf16 is, also at
the end. Against its steps with native products, norms and routers: the same bits, in the logits and in the cache.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.olmoe import modeling_olmoe

from conmoe_edge.integrations.load import load_package
from conmoe_edge.model.source_digest import source_digest
from conmoe_edge.offload.fastpath.fused_router import FusedRouter
from conmoe_edge.offload.fastpath.kv_cache import GrowingLayer
from conmoe_edge.offload.fastpath.supported import (
    LISTED,
    Attention,
    Block,
    Latent,
    Layer,
    Refusal,
    forget_digests,
    listed_name,
    look_up,
)
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import BY_NAME, tiny_model
from tests.hand_packages import identity, write_package
from tests.offload.fastpath.single_tokens import random_parts, steps, transformers_only

pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")

TOKENS = [3 + 7 * i % 90 for i in range(72)]
WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("afmoe", {}),
    ("afmoe", {"attention_bias": True, "sliding_window": 24, "route_scale": 2.0}),
    ("deepseek", {}),
    ("deepseek", {"attention_bias": True, "mlp_bias": True}),
    ("deepseek_v2", {}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True}),
    ("dots1", {}),
    ("dots1", {"attention_bias": True, "norm_topk_prob": False, **WINDOW}),
    ("ernie4_5_moe", {}),
    ("ernie4_5_moe", {"use_bias": True, "moe_num_shared_experts": 0}),
    ("exaone_moe", {}),
    ("exaone_moe", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    ("flex_olmo", {}),
    ("flex_olmo", {"attention_bias": True, "norm_topk_prob": True}),
    ("glm4_moe", {"use_qk_norm": False}),
    ("glm4_moe", {"attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 2.5}),
    ("gpt_oss", {}),
    ("gpt_oss", {"attention_bias": False, "layer_types": ["full_attention"] * 3}),
    ("gpt_oss", {"kind": "int8"}),
    ("granitemoe", {"attention_multiplier": 0.25, "residual_multiplier": 0.7}),
    ("granitemoe", {"attention_bias": True}),
    ("granitemoeshared", {"attention_multiplier": 0.25, "residual_multiplier": 0.7}),
    ("granitemoeshared", {"shared_intermediate_size": 0}),
    ("hunyuan_v1_moe", {}),
    ("hunyuan_v1_moe", {"attention_bias": True}),
    ("lfm2_moe", {}),
    ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 2.0}),
    ("mimo_v2_flash", {}),
    ("mimo_v2_flash", {"attention_bias": True, "sliding_window": 24, "v_head_dim": 16}),
    ("minimax_m2", {}),
    ("minimax_m2", {"rotary_dim": 4}),
    ("mixtral", {}),
    ("mixtral", WINDOW),
    ("olmoe", {"norm_topk_prob": True}),
    ("olmoe", {"attention_bias": True, "num_key_value_heads": 4}),
    ("phimoe", {}),
    ("phimoe", {"attention_bias": True, **WINDOW}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [0], **WINDOW}),
    ("qwen3_5_moe_text", {}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": False, **WINDOW}),
    ("qwen3_next", {}),
    ("qwen3_next", {"mlp_only_layers": [1]}),
    ("solar_open", {}),
    ("solar_open", {"attention_bias": True, "routed_scaling_factor": 2.5}),
]
WINDOWS = ("afmoe", "exaone_moe", "gpt_oss", "mimo_v2_flash")
"""Whose caches with a window are served as well."""
CLOSE = (
    *("afmoe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "flex_olmo"),
    "mimo_v2_flash",
)
"""Where the operator rounds otherwise: compressed or masked attention, and angles in fp32."""
WAYS = {("gpt_oss", "plain"): "block"}
"""How far a layer gets, where not into one call: gpt_oss's experts in bf16 lie the other way round."""


def same_caches(ours: Any, theirs: Any) -> bool:
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        if getattr(a, "keys", None) is not None and not (
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        ):
            return False
    return True


def no_further(found: Any, theirs: Any, exact: Any) -> bool:
    """Whether ``found`` is no further from the numbers in fp32 than ``theirs``: over all tokens, and for the usual one
    of the last ones. Rounding that takes a token to another expert is no drift, but moves the mean of a few tokens.
    """
    ours, other = (
        (one.float() - exact).abs().flatten(1).mean(1).flatten() for one in (found, theirs)
    )
    return all(
        bool(middle(ours[part]) <= 1.5 * middle(other[part]) + 1e-3)
        for part, middle in ((slice(None), torch.mean), (slice(-16, None), torch.median))
    )


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_many_tokens(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    kind = changes.get("kind", "plain")
    changes = {key: value for key, value in changes.items() if key != "kind"}
    plain = random_parts(tiny_model(name, dtype=torch.bfloat16, **changes))
    folder = write_package(plain, tmp_path / "package", identity(plain), kind=kind)
    model: Any = load_package(folder)
    exact, _ = steps(copy.deepcopy(plain).float(), TOKENS)
    theirs, _ = steps(plain, TOKENS)
    with transformers_only():
        wanted, held = steps(model, TOKENS)
    report = model.conmoe.fast_path
    before = report.live()
    found, cache = steps(model, TOKENS)
    served = {way: count - before[way] for way, count in report.live().items()}
    full = sum(type(one) is GrowingLayer for one in cache.layers)
    full = len(cache.layers) if name in WINDOWS else full
    assert served[WAYS.get((name, kind), "layer")] == full * len(TOKENS)
    assert served["tokens"] == len(TOKENS)
    assert no_further(found, theirs if kind == "plain" else wanted, exact)
    if name in CLOSE:
        assert no_further(found, wanted, exact)
        far = (found.float() - wanted.float()).abs().amax(1) / wanted.float().abs().amax(1)
        assert float(far.median()) < 0.02
    else:
        assert torch.equal(found, wanted) and same_caches(cache, held)


@pytest.mark.parametrize(
    "name",
    [
        *("afmoe", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "granitemoeshared", "lfm2_moe"),
        *("hunyuan_v1_moe", "minimax_m2", "mixtral", "phimoe", "qwen2_moe"),
    ],
)
def test_routers_of_the_model_s_own(name: str, tmp_path: Path) -> None:
    """Such as those with closed slots: called between two calls of the operator."""
    plain = random_parts(tiny_model(name, dtype=torch.bfloat16))
    model: Any = load_package(write_package(plain, tmp_path / "package", identity(plain)))
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedRouter):
            del module.forward
    tokens = TOKENS[:16]
    with transformers_only():
        wanted, _ = steps(model, tokens)
    before = model.conmoe.fast_path.live()
    found, _ = steps(model, tokens)
    after = model.conmoe.fast_path.live()
    assert after["block"] - before["block"] >= len(tokens) - 1
    far = (found.float() - wanted.float()).abs().amax(1) / wanted.float().abs().amax(1)
    assert float(far.median()) < 0.02 and float(far[0]) == 0  # the prompt is the same


def test_every_class_on_the_list_is_in_a_tested_family() -> None:
    """Norms and routers have tests of their own too (``test_rms_norm.py``, ``test_router.py``)."""
    found = {
        listed_name(type(module)) for name, _ in CASES for module in tiny_model(name).modules()
    }
    proven = Attention | Latent | Block | Layer
    assert {name for name, (piece, _) in LISTED.items() if isinstance(piece, proven)} <= found


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_installed_release_is_known(name: str) -> None:
    kinds = {type(module) for module in tiny_model(name).modules()}
    for kind in kinds:
        listed = listed_name(kind)
        if listed in LISTED and kind is not torch.nn.LayerNorm:
            assert source_digest(kind) in LISTED[listed][1], listed


def olmoe_attention() -> Any:
    forget_digests()
    return tiny_model("olmoe").model.layers[0].self_attn


def test_a_subclass_is_another_class() -> None:
    module = olmoe_attention()
    assert isinstance(look_up(module, Attention), Attention)

    class OlmoeAttention(type(module)):
        pass

    module.__class__ = OlmoeAttention
    assert look_up(module, Attention) == Refusal("OlmoeAttention is not on the list")


def test_a_branch_that_shows_late_is_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    module = olmoe_attention()
    own = modeling_olmoe.OlmoeAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights, *_ = own(self, *args, **kwargs)
        return out * (1.0 if self.layer_idx < 11 else 3.0), weights

    monkeypatch.setattr(modeling_olmoe.OlmoeAttention, "forward", forward)
    forget_digests()
    found = look_up(module, Attention)
    assert isinstance(found, Refusal) and found.changed and "not the code" in found.reason


def test_a_helper_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_digest(modeling_olmoe.OlmoeAttention)
    monkeypatch.setattr(modeling_olmoe, "rotate_half", lambda x: x)  # not a function of the module
    assert source_digest(modeling_olmoe.OlmoeAttention) != before


def test_a_forward_of_its_own() -> None:
    module = olmoe_attention()
    module.forward = module.forward
    assert look_up(module, Attention) == Refusal("the forward of OlmoeAttention was replaced")


def test_a_class_as_another_piece() -> None:
    assert isinstance(look_up(olmoe_attention(), Layer), Refusal)
