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
from conmoe_edge.offload.fastpath.source_digest import source_digest
from conmoe_edge.offload.fastpath.supported import (
    LISTED,
    Attention,
    Block,
    Layer,
    Refusal,
    forget_digests,
    listed_name,
    look_up,
)
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import BY_NAME, tiny_model
from tests.hand_packages import identity, write_package
from tests.offload.fastpath.single_tokens import (
    installed,
    layers_of_transformers,
    steps,
    transformers_only,
)

pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")

TOKENS = [3 + 7 * i % 90 for i in range(72)]
WINDOW = 24
ATTENTIONS: list[tuple[str, dict[str, Any]]] = [
    ("deepseek", {}),
    ("deepseek", {"attention_bias": True}),
    ("dots1", {}),
    ("dots1", {"attention_bias": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    ("glm4_moe", {}),
    ("glm4_moe", {"attention_bias": True, "use_qk_norm": True}),
    ("granitemoe", {"attention_multiplier": 0.25}),
    ("granitemoe", {"attention_bias": True}),
    ("granitemoeshared", {"attention_multiplier": 0.25}),
    ("minimax_m2", {}),
    ("minimax_m2", {"rotary_dim": 4}),
    ("mixtral", {}),
    ("mixtral", {"sliding_window": WINDOW}),
    ("olmoe", {}),
    ("olmoe", {"attention_bias": True, "num_key_value_heads": 4}),
    ("phimoe", {}),
    ("phimoe", {"attention_bias": True, "sliding_window": WINDOW}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"attention_bias": True, "use_sliding_window": True, "sliding_window": WINDOW}),
    ("solar_open", {}),
    ("solar_open", {"attention_bias": True}),
]
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"mlp_only_layers": []}),
]


def same_caches(ours: Any, theirs: Any) -> bool:
    pairs = zip(ours.layers, theirs.layers, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


@pytest.mark.parametrize(("name", "changes"), ATTENTIONS)
def test_attentions_and_layers(name: str, changes: dict[str, Any]) -> None:
    model, report = installed(name, **changes)
    plain: Any = tiny_model(name, dtype=torch.bfloat16, **changes)
    exact, _ = steps(copy.deepcopy(plain).float(), TOKENS)
    theirs, _ = steps(plain, TOKENS)
    with transformers_only():
        wanted, held = steps(model, TOKENS)
    before = report.live()
    found, cache = steps(model, TOKENS)
    after = report.live()
    assert torch.equal(found, wanted) and same_caches(cache, held)
    for part in (slice(None), slice(-16, None)):
        usual = (theirs[part].float() - exact[part]).abs().mean()
        assert (found[part].float() - exact[part]).abs().mean() <= 1.5 * usual + 1e-3
    served = {way: after[way] - before[way] for way in after}
    sliding = sum(hasattr(one, "sliding_window") for one in cache.layers)
    full = len(cache.layers) - sliding
    way = "block" if any(one.live == "block" for one in report.layers) else "attention"
    assert served[way] == full * (len(TOKENS) - 1)  # the first token is compared
    assert served["tokens"] == len(TOKENS)


@pytest.mark.parametrize(("name", "changes"), LAYERS)
def test_whole_layers(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny_model(name, dtype=torch.bfloat16, **changes)
    exact, _ = steps(copy.deepcopy(plain).float(), TOKENS)
    theirs, _ = steps(plain, TOKENS)
    model: Any = load_package(write_package(plain, tmp_path / "package", identity(plain)))
    with layers_of_transformers():
        wanted, held = steps(model, TOKENS)
    report = model.conmoe.fast_path
    before = report.live()["layer"]
    found, cache = steps(model, TOKENS)
    count = len(report.layers)
    assert report.summary == f"native, {count} of {count} layers in one call"
    assert report.live()["layer"] - before == count * (len(TOKENS) - 1)
    assert torch.equal(found, wanted) and same_caches(cache, held)
    usual = (theirs.float() - exact).abs().mean()
    assert (found.float() - exact).abs().mean() <= 1.5 * usual + 1e-3


def test_every_class_on_the_list_is_in_a_tested_family() -> None:
    """Norms and routers have tests of their own (``test_rms_norm.py``, ``test_router.py``)."""
    names = {name for name, _ in (*ATTENTIONS, *LAYERS)}
    found = {listed_name(type(module)) for name in names for module in tiny_model(name).modules()}
    proven = {
        name for name, (piece, _) in LISTED.items() if isinstance(piece, Attention | Block | Layer)
    }
    assert proven <= found


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_installed_release_is_known(name: str) -> None:
    kinds = {type(module) for module in tiny_model(name).modules()}
    for kind in kinds:
        listed = listed_name(kind)
        if listed in LISTED:
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
        out, weights = own(self, *args, **kwargs)
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
