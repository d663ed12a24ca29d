"""Scopes as a method sees them, from modules and tokens made up here, and what a decision makes of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from families import tiny_model
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.compress.methods.interface import Decision, LayerView, ScopeView
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.statistics import LayerStatistics
from conmoe_edge.compress.stream.expert_hooks import MappedTap, RoutedTap
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.model.experts import find_experts, part_names

LAYOUTS = ("qwen3_moe", "granitemoe", "gpt_oss", "no gate", "norm")


class Experts(nn.Module):
    """An experts module of a layout that no tiny model has: no gate, or a norm behind the down projection."""

    has_bias = True
    is_transposed = False
    is_concatenated = True

    def __init__(self, layout: str, experts: int = 8, hidden: int = 12, width: int = 6) -> None:
        super().__init__()
        self.has_gate = layout == "norm"
        self.has_post_expert_norm = layout == "norm"
        self.act_fn = nn.SiLU()
        rows = 2 * width if self.has_gate else width
        name = "gate_up_proj" if self.has_gate else "up_proj"
        generator = torch.Generator().manual_seed(11)
        shapes = {
            name: (rows, hidden),
            f"{name}_bias": (rows,),
            "down_proj": (hidden, width),
            "down_proj_bias": (hidden,),
        }
        for key, shape in shapes.items():
            value = torch.randn(experts, *shape, generator=generator)
            self.register_parameter(key, nn.Parameter(value))

    def _apply_gate(self, value: Tensor) -> Tensor:
        gate, up = value.chunk(2, -1)
        return self.act_fn(gate) * up

    def post_expert_norm(self, value: Tensor) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def module_of(layout: str) -> Any:
    """The experts of a layer in one of ``LAYOUTS``, random weights, in fp32."""
    if layout in ("no gate", "norm"):
        return Experts(layout)
    return next(iter(find_experts(tiny_model(layout)).values()))[1]


def count_of(module: Any) -> int:
    return module.down_proj.shape[0]


def hidden_size(module: Any) -> int:
    return module.down_proj.shape[2 if module.is_transposed else 1]


def parts_of(module: Any, expert: int) -> dict[str, Tensor]:
    return {name: getattr(module, name)[expert].detach() for name in part_names(module)}


def tokens_for(
    module: Any, count: int = 300, top_k: int = 2, seed: int = 0, unused: tuple[int, ...] = ()
) -> LayerTokens:
    """Tokens whose router likes low expert numbers, and never chooses those of ``unused``."""
    generator = torch.Generator().manual_seed(seed)
    experts = count_of(module)
    wish = torch.rand(count, experts, generator=generator) - torch.arange(experts) * 0.07
    wish[:, list(unused)] = -9.0
    slots = wish.topk(top_k).indices
    slots[0, 0] = experts  # a skip mark
    hidden = torch.randn(count, hidden_size(module), generator=generator)
    return LayerTokens(hidden, slots, torch.rand(count, top_k, generator=generator) + 0.1)


def scope_of(layers: Mapping[int, tuple[Any, LayerTokens]]) -> ScopeView:
    """Layer number -> its experts and its tokens."""
    views, pool = [], []
    for layer, (module, tokens) in layers.items():
        experts = count_of(module)
        counts = torch.bincount(tokens.slots.flatten(), minlength=experts + 1)[:experts].tolist()
        sums = tuple(float(one) for one in counts)
        statistics = LayerStatistics(sums, sums, tuple(counts))
        views.append(LayerView(layer, experts, tokens.slots.shape[1], statistics, tokens))
        pool += [ExpertId(layer, expert) for expert in range(experts)]
    module = list(layers.values())[-1][0]
    weights = ScopeWeights(
        {layer: LoadedLayer(one) for layer, (one, _) in layers.items()}, matrix_views(module)
    )
    return ScopeView(tuple(pool), tuple(views), weights, lambda: torch.zeros(0), module)


def layer_outputs(scope: ScopeView, decision: Decision) -> tuple[Tensor, Tensor]:
    """[T, H] of the last layer as it was, and as it is with what was decided."""
    last = scope.layers[-1]
    tokens = last.tokens
    assert tokens is not None
    slots = [
        slot
        for expert, slot in zip(scope.pool, decision.slots, strict=True)
        if expert.layer == last.layer
    ]
    of = scope.weights.parts if decision.parts is None else decision.parts
    used = {slot.prototype for slot in slots if slot.prototype is not None}
    mapped = MappedTap.of(slots, {one: of(one) for one in used}, None)
    given = scope.module, tokens.hidden, tokens.slots, tokens.gates
    with torch.no_grad():
        return RoutedTap().forward(*given), mapped.forward(*given)
