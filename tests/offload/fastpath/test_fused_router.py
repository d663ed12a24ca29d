"""Routers by the operator: the usual one's numbers, the first of equal slots, and only where it is the usual one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from conmoe_edge.offload.fastpath.fused_router import FusedRouter, fused_router
from conmoe_edge.offload.fastpath.supported import LISTED, Refusal, Router, listed_name
from conmoe_edge.offload.kernels.cpu.bindings import RouterTable, operator
from tests.families import BY_NAME, tiny_model
from tests.offload.fastpath.single_tokens import random_parts

ENGINE: Any = operator()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="no compiler here")
KINDS = {"olmoe": OlmoeTopKRouter, "qwen3_moe": Qwen3MoeTopKRouter, "mixtral": MixtralTopKRouter}


def fused(module: Any) -> FusedRouter:
    found = fused_router(module, ENGINE)
    assert isinstance(found, FusedRouter), found
    return found


def router_of(name: str, **changes: Any) -> Any:
    """A router in bf16 with weights that are no zeros."""
    config: Any = tiny_model(name).config
    for key, value in changes.items():
        setattr(config, key, value)
    module = KINDS[name](config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator))
    return module


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("normed", [False, True])
def test_against_the_formula(name: str, normed: bool) -> None:
    module = router_of(name, norm_topk_prob=normed)
    table = fused(module).current()
    assert isinstance(table, RouterTable)
    for seed in range(20):
        x = torch.randn(1, table.hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()
        logits, gates, slots = ENGINE.route(table, x)
        exact = x.double() @ module.weight.double().T
        assert torch.allclose(logits.double(), exact, rtol=2.0**-7, atol=1e-3)
        p = torch.softmax(logits.double(), -1)
        wanted, order = torch.sort(p[0], descending=True, stable=True)
        assert slots[0].tolist() == order[: table.chosen].tolist()
        wanted = wanted[: table.chosen]
        if normed or name == "mixtral":
            wanted = wanted / wanted.sum()
        assert gates.dtype == module(x)[1].dtype
        assert torch.allclose(gates[0].double(), wanted, rtol=2.0**-7, atol=1e-6)


def test_of_equal_slots_the_first_is_chosen() -> None:
    module = router_of("olmoe")
    module.weight.data[:] = module.weight.data[:1].clone()
    module.weight.data[3] = 0
    x = module.weight.detach()[:1].clone()  # all but one have the same, positive logit
    table = fused(module).current()
    assert isinstance(table, RouterTable)
    slots = ENGINE.route(table, x)[2][0].tolist()
    assert slots == [one for one in range(table.slots) if one != 3][: table.chosen]


def test_many_tokens_go_the_module_s_way() -> None:
    module = router_of("olmoe")
    x = torch.randn(5, module.hidden_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        wanted = module(x)
        for ours, theirs in zip(fused(module)(x), wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_a_weight_that_has_moved_and_a_format_that_is_another() -> None:
    module = router_of("olmoe")
    edge = fused(module)
    x = torch.randn(1, module.hidden_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        before = edge(x)[0]
        module.weight.data = module.weight.detach() * 2
        assert torch.equal(edge(x)[0], before * 2)
        module.weight.data = module.weight.detach().float()
        assert edge(x.float())[0].dtype == torch.float32


def test_another_router_is_left_alone() -> None:
    assert isinstance(fused_router(router_of("olmoe").float(), ENGINE), Refusal)
    assert isinstance(fused_router(nn.Linear(8, 8).to(torch.bfloat16), ENGINE), Refusal)
    narrow = routers_of("hunyuan_v1_moe")[0].to(torch.bfloat16)  # its logits would be bf16
    assert isinstance(fused_router(narrow, ENGINE), Refusal)
    unknown = routers_of("deepseek_v2")[0]
    unknown.topk_method = "noaux_tc"
    assert isinstance(fused_router(unknown, ENGINE), Refusal)


def test_a_subclass_is_left_alone() -> None:
    class Smallest(OlmoeTopKRouter):
        def forward(self, hidden_states):  # type: ignore[no-untyped-def]
            logits = F.linear(hidden_states, self.weight)
            p = F.softmax(logits, dtype=torch.float, dim=-1)
            gates, slots = torch.topk(-p, self.top_k, dim=-1)
            return logits, gates.to(logits.dtype), slots

    module = router_of("olmoe")
    module.__class__ = Smallest
    assert isinstance(fused_router(module, ENGINE), Refusal)


LISTED_ROUTERS = {name for name, (piece, _) in LISTED.items() if isinstance(piece, Router)}


def routers_of(name: str, **changes: Any) -> list[Any]:
    """Those of a tiny model, in the formats that a loaded package has them in."""
    torch.manual_seed(0)
    model = random_parts(tiny_model(name, dtype=torch.bfloat16, **changes))
    found = [one for one in model.modules() if listed_name(type(one)) in LISTED_ROUTERS]
    for one in found:
        if name in ("hunyuan_v1_moe", "ernie4_5_moe"):
            one.float()
        elif hasattr(one, "e_score_correction_bias"):
            one.e_score_correction_bias = one.e_score_correction_bias.float()
    return found


def test_every_router_on_the_list_is_in_a_tested_family() -> None:
    found = {listed_name(type(one)) for name in BY_NAME for one in routers_of(name)}
    assert found == LISTED_ROUTERS


CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "lfm2_moe": {"routed_scaling_factor": 2.0},
}


@pytest.mark.parametrize("name", sorted(BY_NAME))
@pytest.mark.parametrize("changed", [False, True])
def test_every_router_on_the_list(name: str, changed: bool) -> None:
    changes = {"norm_topk_prob": True, **CHANGES.get(name, {})} if changed else {}
    generator, missed = torch.Generator().manual_seed(5), 0
    for module in routers_of(name, **changes):
        inner = {"hunyuan_v1_moe": "wg", "afmoe": "gate"}.get(name, "")
        count, hidden = module.get_submodule(inner).weight.shape
        extra: tuple[Any, ...] = ()
        if name in ("afmoe", "lfm2_moe", "minimax_m2"):  # their blocks give it to them
            extra = (torch.randn(count, generator=generator) * 0.1,)
        edge = fused(module)
        for _ in range(64):
            shape = (1, 1, hidden) if name == "afmoe" else (1, hidden)
            x = torch.randn(shape, generator=generator).bfloat16() * 3
            with torch.no_grad():
                (logits, gates, slots), wanted = edge(x, *extra), module(x, *extra)
            assert [one.dtype for one in (logits, gates)] == [one.dtype for one in wanted[:2]]
            assert torch.allclose(logits.double(), wanted[0].double(), rtol=2.0**-6, atol=2.0**-6)
            ours, theirs = (
                dict(zip(slots[0].tolist(), gates[0].tolist(), strict=True)),
                dict(zip(wanted[2][0].tolist(), wanted[1][0].tolist(), strict=True)),
            )
            # In any order: not every router sorts what it has chosen, and of equal ones it may take another.
            near = {"rel": 2.0**-6, "abs": 2.0**-6}
            assert sorted(ours.values()) == pytest.approx(sorted(theirs.values()), **near)
            both = ours.keys() & theirs.keys()
            assert [ours[slot] for slot in both] == pytest.approx(
                [theirs[one] for one in both], **near
            )
            missed += len(theirs.keys() - ours.keys())
    assert missed < 64 // 8
