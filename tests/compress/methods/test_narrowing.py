"""What neurons cost and who keeps how many (``auto`` with free widths): against least squares and sums over tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.compress.methods import auto as auto_module
from conmoe_edge.compress.methods.auto import AUTO
from conmoe_edge.compress.methods.interface import Decision, LayerView, ScopeView
from conmoe_edge.compress.methods.narrowing import narrowing, narrowings
from conmoe_edge.compress.methods.rebuild import StandIns, activations, error_on, gates_of, rebuild
from conmoe_edge.compress.solvers import neuron_pruning as trim_module
from conmoe_edge.compress.solvers.facility import slot_map_of
from conmoe_edge.compress.solvers.slot_errors import routed_outputs, slot_errors
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stats.statistics import StatisticsTracker
from conmoe_edge.compress.stream.expert_hooks import MappedTap, expert_sum
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.model.experts import expert_forward, find_experts, part_names

K = 2
WIDTHS = (4, 8, 12, 16)
SIZES = (400, 800, 1200, 1600)


@cache
def experts_module() -> Any:
    return next(iter(find_experts(tiny_model("qwen3_moe")).values()))[1]


def changed_module(change: Any) -> Any:
    module = next(iter(find_experts(tiny_model("qwen3_moe")).values()))[1]
    with torch.no_grad():
        change(module)
    return module


@torch.no_grad()
def tokens_for(
    module: Any, count: int = 200, seed: int = 0, unused: tuple[int, ...] = ()
) -> LayerTokens:
    """Random tokens whose target is what the experts give."""
    generator = torch.Generator().manual_seed(seed)
    experts = module.down_proj.shape[0]
    hidden = torch.randn(count, module.down_proj.shape[1], generator=generator)
    wish = torch.rand(count, experts, generator=generator)
    wish[:, list(unused)] = -1.0
    slots = wish.topk(K).indices
    gates = torch.rand(count, K, generator=generator) + 0.1
    target = torch.zeros_like(hidden)
    for expert in range(experts):
        rows, places = (slots == expert).nonzero(as_tuple=True)
        out = expert_forward(module, hidden[rows], parts_of(module, expert))
        target.index_add_(0, rows, out * gates[rows, places].unsqueeze(1))
    held = (torch.arange(count) // 8) % 4 == 3
    return LayerTokens(hidden, slots, gates, target=target, held=held)


def parts_of(module: Any, expert: int) -> dict[str, Tensor]:
    return {name: getattr(module, name)[expert].detach() for name in part_names(module)}


def scope_with(
    module: Any, tokens: LayerTokens, share: float = 0.5, widths: tuple[int, ...] = WIDTHS
) -> ScopeView:
    """A layer whose prototypes have free widths, in a share of the bytes of all its experts."""
    weights = LoadedLayer(module)
    count = weights.experts
    sizes = tuple(100 * width for width in widths)
    view = LayerView(0, count, K, StatisticsTracker(count).result(), tokens)
    return ScopeView(
        tuple(ExpertId(0, number) for number in range(count)),
        (view,),
        ScopeWeights({0: weights}, matrix_views(module)),
        lambda: torch.zeros(0),
        module,
        widths,
        sizes,
        int(share * count * sizes[-1]),
    )


def bytes_of(decision: Decision) -> int:
    return sum(100 * decision.widths.get(one, WIDTHS[-1]) for one in decision.prototypes)


@torch.no_grad()
def test_without_a_neuron_the_error_is_that_of_the_best_constant() -> None:
    module = experts_module()
    tokens = tokens_for(module, 60)
    scope = scope_with(module, tokens)
    grams, found = narrowings(scope, tokens, gates_of(tokens, 8))
    for expert in range(8):
        rows, gates = tokens.routed(expert)
        out = expert_forward(module, tokens.hidden[rows], parts_of(module, expert)).double()
        squares = [float(g) ** 2 for g in gates]
        best = sum(g2 * one for g2, one in zip(squares, out, strict=True)) / sum(squares)
        nothing = sum(
            g2 * float((one - best).square().sum()) for g2, one in zip(squares, out, strict=True)
        )
        errors = found[expert].errors
        # The error with the fewest neurons has the ridge beside it and may be a little greater.
        assert errors[0] == pytest.approx(max(nothing, errors[1]), rel=1e-3)
        assert errors[-1] == 0.0
        assert all(a >= b for a, b in itertools.pairwise(errors))
        assert [len(one) for one in found[expert].neurons] == list(WIDTHS)
        own = activations(scope, tokens, expert, gates_of(tokens, 8)[:, expert])
        values = own.weighted()
        torch.testing.assert_close(grams[expert], values.T @ values)


@torch.no_grad()
def test_what_goes_beside_a_constant_is_measured_without_it() -> None:
    """Many tokens: the error in every width is that of least squares with a constant in the slot's place."""
    module = experts_module()
    tokens = tokens_for(module, 6000)
    scope = scope_with(module, tokens)
    gates = gates_of(tokens, 8)[:, 3]
    own = activations(scope, tokens, 3, gates)
    errors, neurons = (one := narrowing(scope, 3, own, gates[own.rows])).errors, one.neurons
    values = own.weighted()
    target = (values @ module.down_proj[3].detach().T).double()
    for error, kept in zip(errors[1:-1], neurons, strict=False):
        columns = torch.cat([values[:, kept], gates[own.rows].unsqueeze(1)], 1).double()
        solved = torch.linalg.lstsq(columns, target).solution
        assert error == pytest.approx(float((target - columns @ solved).square().sum()), rel=0.1)


@torch.no_grad()
def test_few_tokens_make_every_neuron_dear() -> None:
    """The ridge is worth one token's activations: with a handful of tokens errors do not fall to 0 before the end."""
    module = experts_module()
    tokens = tokens_for(module, 8)
    scope = scope_with(module, tokens)
    _, found = narrowings(scope, tokens, gates_of(tokens, 8))
    came = torch.bincount(tokens.slots.flatten(), minlength=8).tolist()
    assert max(came) < 8
    for count, one in zip(came, found, strict=True):
        if count > 1:
            assert one.errors[-2] > 0.05 * one.errors[0] > 0.0


@torch.no_grad()
@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_a_constant_is_all_that_one_token_needs(factor: float) -> None:
    """And that a hundred equal ones need; what rounding leaves of their Gram matrix breaks nothing."""
    module = experts_module()
    for count in (1, 100):
        tokens = tokens_for(module, 1).rows(torch.zeros(count, dtype=torch.int64))
        tokens = replace(tokens, gates=tokens.gates * factor)
        scope = scope_with(module, tokens)
        _, found = narrowings(scope, tokens, gates_of(tokens, 8))
        assert tokens.target is not None
        for expert in tokens.slots[0].tolist():
            _, gates = tokens.routed(expert)
            out = expert_forward(module, tokens.hidden[:1], parts_of(module, expert))
            whole = float(gates.square().sum() * out.square().sum())
            assert 0.0 <= found[expert].errors[0] < 1e-6 * whole


def test_routed_outputs_are_sums_over_the_tokens_of_a_slot() -> None:
    module = experts_module()
    tokens = tokens_for(module, 40, unused=(5,))
    tokens.slots[0, 0] = 8  # a skip mark
    tokens = replace(tokens, domains=torch.arange(40) % 3)

    @torch.no_grad()
    def forward(expert: int, hidden: Tensor) -> Tensor:
        return expert_forward(module, hidden, parts_of(module, expert))

    found = routed_outputs(tokens, 8, forward)
    energy, peak = torch.zeros(3, 8, dtype=torch.float64), [0.0] * 8
    assert found.outputs is not None
    for t in range(40):
        for place, slot in enumerate(tokens.slots[t].tolist()):
            if slot == 8:
                assert not bool(found.outputs[t, place].any())
                continue
            out = forward(slot, tokens.hidden[t : t + 1])[0]
            energy[t % 3, slot] += float(tokens.gates[t, place]) ** 2 * float(out.square().sum())
            peak[slot] = max(peak[slot], float(out.abs().max()))
            torch.testing.assert_close(found.outputs[t, place], out)
    torch.testing.assert_close(found.energy, energy, rtol=1e-4, atol=1e-9)
    assert found.peak.tolist() == pytest.approx(peak, rel=1e-5)
    assert peak[5] == 0.0
    nobody = routed_outputs(tokens.rows(torch.empty(0, dtype=torch.int64)), 8, forward)
    assert nobody.outputs is None and not bool(nobody.energy.any())


def test_some_columns_of_the_errors_are_those_of_all() -> None:
    module = experts_module()
    tokens = tokens_for(module, 60, unused=(2,))  # a slot that is measured on all tokens

    @torch.no_grad()
    def forward(expert: int, hidden: Tensor) -> Tensor:
        return expert_forward(module, hidden, parts_of(module, expert))

    every, some = (slot_errors(tokens, 8, forward, wanted) for wanted in (None, (1, 2, 6)))
    for name in ("scale", "error"):
        whole, part = getattr(every, name), getattr(some, name)
        assert torch.equal(part[:, [1, 2, 6]], whole[:, [1, 2, 6]])
        others = part[:, [0, 3, 4, 5, 7]]
        assert float(others.sum()) == (5.0 if name == "scale" else 0.0), "the diagonal alone"
    assert torch.equal(some.constant, every.constant)


def test_errors_to_some_slots_are_those_rows_of_all() -> None:
    module = experts_module()
    tokens = tokens_for(module, 60, unused=(2,))
    ran: list[int] = []

    @torch.no_grad()
    def forward(expert: int, hidden: Tensor) -> Tensor:
        ran.append(expert)
        return expert_forward(module, hidden, parts_of(module, expert))

    every = slot_errors(tokens, 8, forward)
    for slots in ([2, 5], [2], [0]):
        ran.clear()
        some = slot_errors(tokens, 8, forward, (1, 4), slots)
        assert set(ran) == {1, 4, *slots}
        for name in ("scale", "error"):
            rows, wanted = getattr(some, name)[slots], getattr(every, name)[slots]
            torch.testing.assert_close(rows[:, [1, 4]], wanted[:, [1, 4]])
        torch.testing.assert_close(some.constant[slots], every.constant[slots])


# -- the whole decision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.15, 0.4, 0.5, 0.75, 0.93])
@torch.no_grad()
def test_a_decision_takes_no_more_than_its_room(share: float) -> None:
    module = experts_module()
    tokens = tokens_for(module)
    scope = scope_with(module, tokens, share)
    decision = AUTO.decide(scope, 0)
    assert scope.room - SIZES[0] < bytes_of(decision) <= scope.room
    assert decision.parts is not None and set(decision.widths) == set(decision.prototypes)
    assert set(decision.widths.values()) <= set(WIDTHS)
    for one in decision.prototypes:
        width = decision.widths[one]
        parts = decision.parts(one)
        assert parts["down_proj"].shape == (32, width)
        assert parts["gate_up_proj"].shape == (2 * width, 32)
    kept = set(decision.prototypes)
    for number, slot in enumerate(decision.slots):
        if ExpertId(0, number) in kept:
            assert (slot.prototype, slot.scale) == (ExpertId(0, number), 1.0)
        else:
            assert slot.prototype is None or slot.prototype in kept
    # Random experts have little in common, and still more bytes leave less.
    assert tokens.target is not None
    nothing = float(tokens.target.square().sum())
    assert error_on(scope, tokens, decision) < (1.0 - 0.5 * share) * nothing


@torch.no_grad()
def test_all_the_room_changes_nothing() -> None:
    module = experts_module()
    tokens = tokens_for(module)
    for widths in (WIDTHS, (16,)):
        decision = AUTO.decide(scope_with(module, tokens, 1.0, widths), 0)
        assert decision.parts is None and not decision.widths
        assert all(
            slot.prototype == one
            for one, slot in zip(decision.prototypes, decision.slots, strict=True)
        )


@torch.no_grad()
def test_where_there_is_one_width_experts_alone_go() -> None:
    module = experts_module()
    tokens = tokens_for(module)
    for share, count in ((0.5, 4), (0.6, 4), (0.02, 1)):
        decision = AUTO.decide(scope_with(module, tokens, share, (16,)), 99)
        assert len(decision.prototypes) == count
        assert set(decision.widths.values()) <= {16}


@torch.no_grad()
def test_the_order_of_an_experts_neurons_does_not_matter() -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))

    def shuffle(module: Any) -> None:
        module.down_proj[2] = module.down_proj[2][:, order]
        module.gate_up_proj[2] = module.gate_up_proj[2][torch.cat([order, 16 + order])]

    plain, shuffled = experts_module(), changed_module(shuffle)
    tokens = tokens_for(plain)
    first = AUTO.decide(scope_with(plain, tokens), 0)
    second = AUTO.decide(scope_with(shuffled, tokens), 0)
    assert first.widths == second.widths
    assert [slot.prototype for slot in first.slots] == [slot.prototype for slot in second.slots]
    assert error_on(scope_with(plain, tokens), tokens, first) == pytest.approx(
        error_on(scope_with(shuffled, tokens), tokens, second), rel=1e-3
    )


@torch.no_grad()
def test_an_expert_that_nobody_chose_goes_first() -> None:
    module = experts_module()
    tokens = tokens_for(module, unused=(3,))
    decision = AUTO.decide(scope_with(module, tokens, 0.8), 0)
    assert ExpertId(0, 3) not in decision.prototypes


@torch.no_grad()
def test_an_expert_that_gives_hardly_anything_goes_before_others() -> None:
    module = changed_module(lambda one: one.down_proj[5].mul_(0.05))
    tokens = tokens_for(module)
    decision = AUTO.decide(scope_with(module, tokens, 0.85), 0)
    widths = [decision.widths.get(ExpertId(0, number), 0) for number in range(8)]
    assert widths[5] == min(widths) < 16
    assert decision.slots[5].constant is not None, "its mean stays"


@torch.no_grad()
def test_neurons_that_repeat_others_go_before_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert with each of its neurons twice: half of the bytes leave nothing undone.

    One neuron a round: of two that are the same, both are cheap as long as the other is there.
    """
    monkeypatch.setattr(trim_module, "ROUNDS", WIDTHS[-1])

    def repeat(module: Any) -> None:
        half = module.down_proj[:, :, :8].clone()
        module.down_proj.copy_(torch.cat([half, half], 2))
        gate, up = module.gate_up_proj[:, :8].clone(), module.gate_up_proj[:, 16:24].clone()
        module.gate_up_proj.copy_(torch.cat([gate, gate, up, up], 1))

    module = changed_module(repeat)
    tokens = tokens_for(module, 8000)
    scope = scope_with(module, tokens, 0.5)
    decision = AUTO.decide(scope, 0)
    assert [decision.widths[one] for one in scope.pool] == [8] * 8
    assert tokens.target is not None
    left = error_on(scope, tokens, decision)
    assert left < 0.01 * float(tokens.target.square().sum())


@torch.no_grad()
def test_a_super_expert_keeps_half_of_its_neurons() -> None:
    """One token in 300 needs it, and with it alone the output is a hundred times as large."""

    def loud(module: Any) -> None:
        module.down_proj[6] *= 100.0

    module = changed_module(loud)
    tokens = tokens_for(module, 300, unused=(6,))
    tokens.slots[0, 0] = 6
    tokens.gates[0, 0] = 1e-4
    decision = AUTO.decide(scope_with(module, tokens, 0.4), 0)
    assert decision.widths[ExpertId(0, 6)] >= 8
    tokens.slots[0, 0] = 5  # without its token it is nobody's
    decision = AUTO.decide(scope_with(module, tokens, 0.4), 0)
    assert ExpertId(0, 6) not in decision.prototypes


@torch.no_grad()
def test_gram_matrices_that_are_there_are_not_summed_again() -> None:
    """``grams`` of a rebuild is a shortcut only: with those of the same tokens the same comes out without it."""
    module = experts_module()
    tokens = tokens_for(module)
    scope = scope_with(module, tokens, 0.4)
    grams, found = narrowings(scope, tokens, gates_of(tokens, 8))
    chosen = StandIns(slot_map_of(0, range(8)), {e: found[e].neurons[e % 2] for e in range(8)})
    first, second = rebuild(scope, tokens, chosen, grams), rebuild(scope, tokens, chosen)
    assert first.parts is not None and second.parts is not None
    for one in first.prototypes:
        for name, part in first.parts(one).items():
            torch.testing.assert_close(part, second.parts(one)[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_left_is_what_the_decision_leaves() -> None:
    """``Decision.left`` against the layer computed with the decision's own weights, constants and slots."""
    module = experts_module()
    tokens = tokens_for(module)
    weights = torch.rand(len(tokens), generator=torch.Generator().manual_seed(2)) + 0.5
    tokens = replace(tokens, weights=weights)
    decision = AUTO.decide(scope := scope_with(module, tokens, 0.4), 0)
    assert decision.left is not None and decision.parts is not None
    assert len(decision.prototypes) < 8 or set(decision.widths.values()) != {WIDTHS[-1]}
    parts = {one: decision.parts(one) for one in decision.prototypes}
    tap = MappedTap.of(decision.slots, parts, decision.constants[scope.layers[0].layer])
    given = expert_sum(module, tap, tokens, torch.device("cpu"))
    assert tokens.target is not None
    left = (tokens.target - given) * weights.unsqueeze(1)
    torch.testing.assert_close(decision.left, left, rtol=1e-3, atol=1e-5)
    assert float(left.norm()) > 0.01 * float(tokens.target.norm())


def test_a_sample_about_slots_has_their_tokens() -> None:
    module = experts_module()
    tokens = tokens_for(module, 9000)
    gone = torch.tensor([1, 4])
    sample = auto_module._about(tokens, gone)
    visits = int(torch.isin(sample.slots, gone).sum())
    assert 2 * 128 <= visits < 2 * 200 and len(sample) < 512
    every = auto_module._about(tokens, torch.arange(8))
    assert len(every) <= 2048
    chose = torch.isin(sample.slots, gone).any(1)
    everywhere = float(torch.isin(tokens.slots, gone).any(1).float().mean())
    assert float(chose.float().mean()) > 0.7 > everywhere
    assert not bool(chose.all()), "others are among them"
    few = auto_module._about(tokens.rows(torch.arange(3)), gone)
    assert len(few) == 3
