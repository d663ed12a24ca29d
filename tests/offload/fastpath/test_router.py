"""Routers by the operator: the usual one's numbers, the first of equal slots, and only where it is the usual one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from conmoe_edge.offload.fastpath.router import FusedRouter, fused_router, router_table
from conmoe_edge.offload.fastpath.supported import LISTED, Refusal, Router, listed_name
from conmoe_edge.offload.kernels.cpu.bindings import RouterTable, operator
from tests.families import BY_NAME, tiny_model

ENGINE: Any = operator()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="no compiler here")
KINDS = {"olmoe": OlmoeTopKRouter, "qwen3_moe": Qwen3MoeTopKRouter, "mixtral": MixtralTopKRouter}


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
    table = router_table(module, ENGINE)
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
    table = router_table(module, ENGINE)
    assert isinstance(table, RouterTable)
    slots = ENGINE.route(table, x)[2][0].tolist()
    assert slots == [one for one in range(table.slots) if one != 3][: table.chosen]


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_family_routes_as_before(name: str) -> None:
    """Whole forwards of one token: a router is either the usual one, or it was left alone."""
    torch.manual_seed(0)
    model: Any = tiny_model(name, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        before = model(torch.tensor([[7]])).logits.float()
        count = 0
        for module in model.modules():
            made = fused_router(module, ENGINE)
            if isinstance(made, FusedRouter):
                module.forward, count = made, count + 1
        after = model(torch.tensor([[7]])).logits.float()
    usual = name in ("flex_olmo", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next")
    assert count > 0 or not usual
    assert torch.allclose(before, after, atol=0.06 * before.abs().max().item())


def test_many_tokens_go_the_module_s_way() -> None:
    module = router_of("olmoe")
    x = torch.randn(5, module.hidden_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        wanted = module(x)
        edge = FusedRouter(module, router_table(module, ENGINE), ENGINE)  # type: ignore[arg-type]
        for ours, theirs in zip(edge(x), wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_a_weight_that_has_moved_and_a_format_that_is_another() -> None:
    module = router_of("olmoe")
    edge = FusedRouter(module, router_table(module, ENGINE), ENGINE)  # type: ignore[arg-type]
    x = torch.randn(1, module.hidden_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    module.weight.data = module.weight.detach() * 2
    with torch.no_grad():
        for ours, theirs in zip(edge(x), module(x), strict=True):
            assert torch.equal(ours, theirs)
    module.weight.data = module.weight.detach().float()
    with torch.no_grad():
        assert edge(x.float())[0].dtype == torch.float32


def test_another_router_is_left_alone() -> None:
    assert isinstance(router_table(router_of("olmoe").float(), ENGINE), Refusal)
    config: Any = tiny_model("deepseek_v3").config
    assert isinstance(
        router_table(DeepseekV3TopkRouter(config).to(torch.bfloat16), ENGINE), Refusal
    )
    assert isinstance(router_table(nn.Linear(8, 8).to(torch.bfloat16), ENGINE), Refusal)


def test_a_subclass_is_left_alone() -> None:
    class Smallest(OlmoeTopKRouter):
        def forward(self, hidden_states):  # type: ignore[no-untyped-def]
            logits = F.linear(hidden_states, self.weight)
            p = F.softmax(logits, dtype=torch.float, dim=-1)
            gates, slots = torch.topk(-p, self.top_k, dim=-1)
            return logits, gates.to(logits.dtype), slots

    module = router_of("olmoe")
    module.__class__ = Smallest
    assert isinstance(router_table(module, ENGINE), Refusal)


LISTED_ROUTERS = {name for name, (piece, _) in LISTED.items() if isinstance(piece, Router)}


def routers_of(name: str, **changes: Any) -> list[Any]:
    torch.manual_seed(0)
    modules = tiny_model(name, dtype=torch.bfloat16, **changes).modules()
    return [one for one in modules if listed_name(type(one)) in LISTED_ROUTERS]


def test_every_router_on_the_list_is_in_a_tested_family() -> None:
    found = {listed_name(type(one)) for name in BY_NAME for one in routers_of(name)}
    assert found == LISTED_ROUTERS


@pytest.mark.parametrize("name", sorted(BY_NAME))
@pytest.mark.parametrize("normed", [False, True])
def test_every_router_on_the_list(name: str, normed: bool) -> None:
    for module in routers_of(name, norm_topk_prob=normed):
        fused = fused_router(module, ENGINE)
        assert isinstance(fused, FusedRouter)
        generator = torch.Generator().manual_seed(5)
        for _ in range(64):
            x = torch.randn(1, module.weight.shape[1], generator=generator).bfloat16() * 3
            with torch.no_grad():
                (logits, gates, slots), wanted = fused(x), module(x)
            assert [one.dtype for one in (logits, gates)] == [one.dtype for one in wanted[:2]]
            assert torch.allclose(logits.double(), wanted[0].double(), rtol=2.0**-6, atol=2.0**-6)
            assert torch.allclose(gates.double(), wanted[1].double(), rtol=2.0**-6, atol=2.0**-6)
            chosen, right = (wanted[0].gather(1, one).double() for one in (slots, wanted[2]))
            assert torch.allclose(chosen, right, rtol=2.0**-6, atol=2.0**-6)
