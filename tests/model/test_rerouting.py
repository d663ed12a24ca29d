"""Closed router slots, for every family: against the router's own code with those logits at minus infinity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_config, tiny_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conmoe_edge.model import bridge
from conmoe_edge.model.rerouting import can_choose, least_open, reroute, rerouted
from conmoe_edge.model.router import Router, Selection, find_routers

NAMES = [family.model_type for family in FAMILIES]
PLAIN_SOFTMAX = ("deepseek", "deepseek_v2", "flex_olmo", "olmoe", "qwen2_moe")
"""Families that multiply with the softmax over all slots, not renormalised over the chosen ones."""

OPEN = [True, False, True, True, False, True, True, True]


class MinusInfinity(TorchFunctionMode):
    """The reference: the columns of closed slots in every product that gives a number a slot."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear" and out.shape[-1] == len(OPEN):
            out = out.masked_fill(torch.tensor([not one for one in OPEN]), float("-inf"))
        return out


@contextmanager
def calls_of(model: nn.Module, module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """What a module is called with while the model runs."""
    seen: list[tuple[Any, Any]] = []
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def router_and_call(name: str, **overrides: Any) -> tuple[nn.Module, Router, Any]:
    """A model, the router of its first MoE layer in it, and arguments that it is called with."""
    meta = bridge.build_meta(tiny_config(name, **overrides), torch.float32)
    found = next(iter(find_routers(meta).values()))
    model = tiny_model(name, **overrides)
    router = replace(found, module=model.get_submodule(found.path))
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), calls_of(model, router.module) as seen:
        model(input_ids=ids, use_cache=False)
    return model, router, seen[0]


def by_slot(output: Any) -> tuple[Tensor, Tensor]:
    """Slots [T, K] ascending and the gates that go with them, of a router's output in whatever order."""
    slots = next(one for one in output if not one.is_floating_point())
    gates = next(one for one in output if one.is_floating_point() and one.shape == slots.shape)
    order = slots.argsort(-1)
    return slots.gather(-1, order), gates.gather(-1, order)


CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in NAMES]
CASES += [
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("olmoe", {"norm_topk_prob": True}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 2}),
    ("deepseek_v3", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}),
]


@pytest.mark.parametrize(("name", "overrides"), CASES)
@torch.no_grad()
def test_as_with_logits_at_minus_infinity(name: str, overrides: dict[str, Any]) -> None:
    """The same choice; the same gates where they are renormalised, the original's where they are not."""
    _, router, (args, kwargs) = router_and_call(name, **overrides)
    before = router.module(*args, **kwargs)
    with MinusInfinity():
        wanted, wanted_gates = by_slot(router.module(*args, **kwargs))
    if name == "deepseek_v3" and overrides:  # a group with one open slot is never ranked by two
        wanted, wanted_gates = in_groups_by_hand(before[0], 4, 2, 2, router.module)
    if (
        name == "ernie4_5_moe"
    ):  # its bias is added to a softmax over all slots, which stays as it is
        wanted, wanted_gates = ernie_by_hand(before[0], router.module)
    with rerouted(router, OPEN):
        found, gates = by_slot(router.module(*args, **kwargs))
    assert torch.equal(found, wanted)
    assert all(OPEN[slot] for slot in found.flatten().tolist())
    assert any(not OPEN[slot] for slot in by_slot(before)[0].flatten().tolist()), (
        "nothing was tested"
    )
    plain = name in PLAIN_SOFTMAX and not overrides.get("norm_topk_prob")
    if plain or overrides.get("norm_topk_prob") is False:
        scores = before[0].float().softmax(-1)  # over all slots
        wanted_gates = scores.gather(-1, found) * getattr(router.module, "routed_scaling_factor", 1)
        assert bool((gates.sum(-1) < 0.999).all())
    torch.testing.assert_close(gates, wanted_gates, rtol=1e-5, atol=1e-6)
    after = router.module(*args, **kwargs)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def ernie_by_hand(logits: Tensor, module: Any) -> tuple[Tensor, Tensor]:
    """The best open slots by probability plus bias; gates renormalised."""
    bias = module.moe_statics.e_score_correction_bias.flatten().tolist()
    assert any(bias)
    slots, gates = [], []
    for row in logits.softmax(-1).tolist():
        able = [i for i in range(len(OPEN)) if OPEN[i]]
        taken = sorted(sorted(able, key=lambda i: -(row[i] + bias[i]))[:3])
        slots.append(taken)
        gates.append([row[i] / sum(row[j] for j in taken) for i in taken])
    return torch.tensor(slots), torch.tensor(gates)


def in_groups_by_hand(
    logits: Tensor, groups: int, open_groups: int, chosen: int, module: Any
) -> tuple[Tensor, Tensor]:
    """DeepSeek V3's choice, token by token: groups ranked by their two best open slots."""
    size = len(OPEN) // groups
    slots, gates = [], []
    for row in logits.sigmoid().tolist():
        ranks = []
        for group in range(groups):
            inside = [row[i] for i in range(group * size, (group + 1) * size) if OPEN[i]]
            ranks.append(sum(sorted(inside)[-2:]) if len(inside) >= 2 else float("-inf"))
        best = sorted(range(groups), key=lambda g: -ranks[g])[:open_groups]
        able = [i for i in range(len(OPEN)) if OPEN[i] and i // size in best]
        taken = sorted(sorted(able, key=lambda i: -row[i])[:chosen])
        total = sum(row[i] for i in taken) if module.norm_topk_prob else 1.0
        slots.append(taken)
        gates.append([row[i] / total * module.routed_scaling_factor for i in taken])
    return torch.tensor(slots), torch.tensor(gates)


@torch.no_grad()
def test_nothing_closed_changes_nothing() -> None:
    model, router, _ = router_and_call("qwen3_moe")
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(2))
    before = model(input_ids=ids, use_cache=False).logits
    own = router.module.forward
    with rerouted(router, [True] * 8):
        assert router.module.forward == own
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


@torch.no_grad()
def test_undone_to_what_was_there() -> None:
    """Also over another forward of the instance, as accelerate puts there."""
    _, router, (args, kwargs) = router_and_call("mixtral")
    own = router.module.forward
    router.module.forward = lambda *a, **k: own(*a, **k)  # type: ignore[method-assign]
    replaced = router.module.forward
    undo = reroute(router, OPEN)
    _, _, slots = router.module(*args, **kwargs)
    assert all(OPEN[slot] for slot in slots.flatten().tolist())
    undo()
    assert router.module.forward is replaced


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_can_choose_says_what_every_ranking_gives(groups: int) -> None:
    """Against trying out which groups could be opened, over all masks of eight slots."""
    for open_groups, chosen, per_group in product(range(1, groups + 1), (1, 2, 3), (1, 2)):
        selection = Selection(chosen, groups, open_groups, 1 if groups == 1 else per_group, calls=1)
        size = 8 // groups
        for number in range(256):
            mask = [bool(number >> bit & 1) for bit in range(8)]
            counts = [sum(mask[g * size : (g + 1) * size]) for g in range(groups)]
            able = [c for c in counts if c >= selection.per_group]
            worst = sum(sorted(able)[:open_groups]) if len(able) >= open_groups else -1
            assert can_choose(selection, mask) == (worst >= chosen)
        least = least_open(selection)
        if least <= 8:
            even = [i % size < least // groups for i in range(8)]
            assert sum(even) == least and can_choose(selection, even)
