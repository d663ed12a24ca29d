"""Prototypes of a decided scope rounded with error feedback, for every layout of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import tiny_model
from scopes import Experts, parts_of, scope_of, tokens_for
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import best_kind, quantised_parts
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout, SlotRecord
from conmoe_edge.checkpoint.format.records import encode
from conmoe_edge.compress.methods import rounded_prototypes
from conmoe_edge.compress.methods.interface import Decision, ScopeView, identity
from conmoe_edge.compress.methods.rounded_prototypes import RoundedPrototypes
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stream.expert_hooks import MappedTap
from conmoe_edge.model.experts import find_experts

LAYOUTS = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32},
    "granitemoe": {"hidden_size": 64, "intermediate_size": 32},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32},
    "no gate": {},
    "norm": {},
}


def module_of(layout: str) -> Any:
    if layout in ("no gate", "norm"):
        return Experts(layout, hidden=64, width=32)
    model = tiny_model(layout, **LAYOUTS[layout])
    return next(iter(find_experts(model).values()))[1]


def tokens_of(module: Any, count: int, seed: int, **more: Any) -> LayerTokens:
    """Tokens whose numbers go together."""
    tokens = tokens_for(module, count, seed=seed, **more)
    generator = torch.Generator().manual_seed(1)
    width = tokens.hidden.shape[1]
    mixed = torch.randn(width, width, generator=generator) * 0.3 + torch.eye(width)
    return replace(tokens, hidden=tokens.hidden * torch.linspace(0.2, 2, width) @ mixed)


def layout_of(module: Any, kind: str) -> RecordLayout:
    parts = []
    for name, part in parts_of(module, 0).items():
        if part.dim() == 2:
            rows, columns = part.T.shape if module.is_transposed else part.shape
            parts += quantised_parts(name, rows, columns, best_kind(rows, columns, kind))  # type: ignore[arg-type]
        else:
            parts.append((name, tuple(part.shape), "float32"))
    return make_layout(tuple(parts), kind)


def output(
    scope: ScopeView, decision: Decision, records: dict[ExpertId, Any] | None, tokens: LayerTokens
) -> Tensor:
    """[T, H] of the layer with prototypes as they are, or as ``records`` have them."""
    of = decision.parts or scope.weights.parts
    parts = {one: of(one) if records is None else records[one] for one in decision.prototypes}
    tap = MappedTap.of(decision.slots, parts, decision.constants.get(0))
    with torch.no_grad():
        return tap.forward(scope.module, tokens.hidden, tokens.slots.clamp(max=7), tokens.gates)


def records_of(
    scope: ScopeView, decision: Decision, layout: RecordLayout, rounded: Any
) -> dict[ExpertId, Any]:
    transposed = bool(scope.module.is_transposed)
    of = scope.weights.parts if decision.parts is None else decision.parts
    return {
        one: encode(layout, of(one), transposed, None if rounded is None else rounded.made(one))
        for one in decision.prototypes
    }


def rounded_of(scope: ScopeView, decision: Decision, layout: RecordLayout) -> RoundedPrototypes:
    tokens = scope.layers[0].tokens
    assert tokens is not None
    layouts = dict.fromkeys(decision.prototypes, layout)
    return RoundedPrototypes(scope, decision, layouts, {0: tokens})


@pytest.mark.parametrize("kind", ["int8", "int4", "q3"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_less_is_lost_on_tokens_that_were_not_seen(name: str, kind: str) -> None:
    module = module_of(name)
    scope = scope_of({0: (module, tokens_of(module, 1500, 0))})
    decision, layout = identity(scope), layout_of(module, kind)
    unseen = tokens_of(module, 600, 7)
    exact = output(scope, decision, None, unseen)
    lost = [
        float(
            (output(scope, decision, records_of(scope, decision, layout, one), unseen) - exact)
            .square()
            .sum()
        )
        for one in (rounded_of(scope, decision, layout), None)
    ]
    assert lost[0] < 0.85 * lost[1]


def two_slots_each(scope: ScopeView) -> Decision:
    """Four prototypes, each for a slot of its own and for one of another expert's, scaled."""
    kept = scope.pool[::2]
    slots = tuple(
        SlotRecord(kept[place // 2], 1.0 if place % 2 == 0 else 0.5)
        for place in range(len(scope.pool))
    )
    return Decision(kept, slots)


def test_a_prototype_is_rounded_for_the_tokens_of_all_its_slots() -> None:
    module = module_of("qwen3_moe")
    scope = scope_of({0: (module, tokens_of(module, 1500, 0))})
    decision, layout = two_slots_each(scope), layout_of(module, "q3")
    rounded = rounded_of(scope, decision, layout)
    tokens = scope.layers[0].tokens
    assert tokens is not None
    hidden, weights = rounded._inputs(decision.prototypes[1])
    wanted = (tokens.gates * ((tokens.slots == 2) + 0.5 * (tokens.slots == 3))).sum(1)
    rows = wanted.nonzero().squeeze(1)
    assert torch.equal(hidden, tokens.hidden[rows])
    torch.testing.assert_close(weights, wanted[rows])


@pytest.mark.parametrize("together", [1, 1 << 28])
def test_a_few_at_a_time_or_all_at_once(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("gpt_oss")
    scope = scope_of({0: (module, tokens_of(module, 600, 0))})
    decision, layout = identity(scope), layout_of(module, "int4")
    monkeypatch.setattr(rounded_prototypes, "_AT_ONCE", together)
    rounded = rounded_of(scope, decision, layout)
    most = 0
    for one in decision.prototypes:
        assert set(rounded.made(one)) == {"gate_up_proj", "down_proj"}
        most = max(most, len(rounded._ready))
    assert most == (1 if together == 1 else 8)


def test_few_tokens_or_none_are_noted_and_nearer_than_to_the_nearest() -> None:
    """Expert 7 is chosen by nobody, expert 6 by three: they follow what other tokens are like."""
    module = module_of("qwen3_moe")
    tokens = tokens_of(module, 1500, 0, unused=(6, 7))
    slots = tokens.slots.clone()
    slots[10:13, 0] = 6
    scope = scope_of({0: (module, replace(tokens, slots=slots))})
    decision, layout = identity(scope), layout_of(module, "q3")
    rounded = rounded_of(scope, decision, layout)
    records = records_of(scope, decision, layout, rounded)
    (note,) = rounded.decision().notes
    assert "came to 2 of 8 prototypes" in note and note.startswith("Layer 0:")
    plain = records_of(scope, decision, layout, None)
    unseen = tokens_of(module, 600, 7)
    for expert in (6, 7):
        only = replace(unseen, slots=torch.full_like(unseen.slots, expert))
        exact = output(scope, decision, None, only)
        lost = [
            float((output(scope, decision, one, only) - exact).square().sum())
            for one in (records, plain)
        ]
        assert lost[0] < 0.9 * lost[1]


def test_constants_make_up_for_what_rounding_lost() -> None:
    module = module_of("qwen3_moe")
    scope = scope_of({0: (module, tokens_of(module, 1500, 0))})
    slots = tuple(
        SlotRecord(one) if place > 1 else SlotRecord(None, constant=place)
        for place, one in enumerate(scope.pool)
    )
    constants = {0: torch.randn(2, 64, generator=torch.Generator().manual_seed(3))}
    decision, layout = Decision(scope.pool[2:], slots, constants), layout_of(module, "q2")
    tokens = scope.layers[0].tokens
    assert tokens is not None
    exact = output(scope, decision, None, tokens)
    rounded = rounded_of(scope, decision, layout)
    records = records_of(scope, decision, layout, rounded)
    after = rounded.decision()
    assert not torch.equal(after.constants[0], constants[0])
    lost = [
        float((output(scope, one, records, tokens) - exact).square().sum())
        for one in (after, decision)
    ]
    assert lost[0] < lost[1]
