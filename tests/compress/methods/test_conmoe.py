"""ConMoE against a transcription of the paper in plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.methods.conmoe import min_max, nearest_prototype, replaceability
from conmoe_edge.compress.methods.interface import LayerView, ScopeView
from conmoe_edge.compress.solvers import weight_distance as distance_module
from conmoe_edge.compress.solvers.ranking import top_k
from conmoe_edge.compress.solvers.weight_distance import distances
from conmoe_edge.compress.stats.statistics import LayerStatistics
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.plan.levers import kept

H, WIDTH = 6, 4


class FakeExperts(nn.Module):
    """Fused parameters with the marks of transformers' experts modules."""

    def __init__(
        self, experts: int, *, transposed: bool, concatenated: bool, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        up, down = ((H, 2 * WIDTH), (WIDTH, H)) if transposed else ((2 * WIDTH, H), (H, WIDTH))
        self.gate_up_proj = nn.Parameter(torch.randn(experts, *up, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(experts, *down, generator=generator))
        self.is_transposed, self.is_concatenated = transposed, concatenated
        self.has_gate, self.has_bias, self.has_post_expert_norm = True, False, False

    def _apply_gate(self, value: Tensor) -> Tensor:
        return value


def matrices(module: FakeExperts, expert: int) -> dict[str, list[float]]:
    """gate, up, down of one expert as flat lists, told apart element by element."""
    fused, down = module.gate_up_proj[expert], module.down_proj[expert]
    flat: dict[str, list[float]] = {"gate": [], "up": [], "down": down.flatten().tolist()}
    for row in range(fused.shape[0]):
        for column in range(fused.shape[1]):
            position = column if module.is_transposed else row
            if module.is_concatenated:
                name = "gate" if position < WIDTH else "up"
            else:
                name = "gate" if position % 2 == 0 else "up"
            flat[name].append(float(fused[row, column]))
    return flat


def brute_distance(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    total = 0.0
    for name in ("gate", "up", "down"):
        a, b = one[name], other[name]
        difference = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
        norms = math.sqrt(sum(x * x for x in a)) + math.sqrt(sum(y * y for y in b))
        total += 2 * difference / (norms + 2e-12)
    return total / 3


def brute_conmoe(
    contribution: list[float], d: list[list[float]], keep: int
) -> tuple[list[int], list[int]]:
    """Section 3 of the paper, line by line: (prototypes, map)."""
    count = len(contribution)
    b = [min(d[e][o] for o in range(count) if o != e) if count > 1 else 0.0 for e in range(count)]

    def normalised(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(value - low) / (high - low + 1e-12) for value in values]

    score = [x * y for x, y in zip(normalised(contribution), normalised(b), strict=True)]
    order = sorted(range(count), key=lambda e: (-score[e], e))
    prototypes = sorted(order[:keep])
    mapping = []
    for e in range(count):
        mapping.append(e if e in prototypes else min(prototypes, key=lambda p: (d[e][p], p)))
    return prototypes, mapping


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
def test_distance_equals_plain_loops(
    transposed: bool, concatenated: bool, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance_module, "BLOCK_BYTES", block_bytes)
    layers = {
        layer: FakeExperts(3, transposed=transposed, concatenated=concatenated, seed=layer)
        for layer in (2, 5)
    }
    weights = ScopeWeights({k: LoadedLayer(m) for k, m in layers.items()}, matrix_views(layers[2]))
    found = distances(weights)
    flat = [matrices(layers[layer], expert) for layer in (2, 5) for expert in range(3)]
    wanted = torch.tensor([[brute_distance(a, b) for b in flat] for a in flat], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, found.T)


def test_equal_experts_have_distance_zero_exactly() -> None:
    module = FakeExperts(4, transposed=False, concatenated=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[3] = parameter[1]
            parameter[2] = parameter[1] * (1 + 1e-4)
    found = distances(ScopeWeights({0: LoadedLayer(module)}, matrix_views(module)))
    assert found[1, 3] == 0.0
    assert found[1, 2].item() == pytest.approx(
        1e-4, rel=1e-2
    )  # would drown in the cancellation of inner products


@given(data=st.data(), count=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_decision_equals_the_paper(data: st.DataObject, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 3, generator=generator, dtype=torch.float64).round(decimals=1)
    d = torch.cdist(points, points)
    # Few distinct values, so that ties happen.
    contribution = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=count, max_size=count))
    )
    contribution = contribution.double()
    keep = data.draw(st.integers(1, count))
    pool = tuple(
        ExpertId(layer, expert) for layer, expert in ((n // 4, n % 4) for n in range(count))
    )
    decision = METHODS["conmoe"].decide(scope_of(pool, contribution, d), keep)
    if keep == count:
        assert [slot.prototype for slot in decision.slots] == list(pool)
        return
    prototypes, mapping = brute_conmoe(contribution.tolist(), d.tolist(), keep)
    assert decision.prototypes == tuple(pool[p] for p in prototypes)
    assert [slot.prototype for slot in decision.slots] == [pool[p] for p in mapping]
    assert all(slot.scale == 1.0 and slot.constant is None for slot in decision.slots)


def scope_of(pool: tuple[ExpertId, ...], contribution: Tensor, d: Tensor) -> ScopeView:
    """A scope of layers of four experts, each of which was asked for once."""
    layers = []
    for layer in sorted({expert.layer for expert in pool}):
        own = [i for i, expert in enumerate(pool) if expert.layer == layer]
        sums = tuple(contribution[own].tolist())
        statistics = LayerStatistics(sums, sums, (1,) * len(own))
        layers.append(LayerView(layer, len(own), 2, statistics))
    nothing = ScopeWeights({}, {})
    return ScopeView(pool, tuple(layers), nothing, lambda: d, nn.Module())


def test_ties_go_to_the_lowest() -> None:
    assert top_k(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2) == (1, 2)
    flat = torch.ones(4, 4) - torch.eye(4)
    assert nearest_prototype(flat, (1, 3)) == (1, 1, 1, 3)


def test_prototypes_map_to_themselves_even_among_equals() -> None:
    assert nearest_prototype(torch.zeros(3, 3), (0, 2)) == (0, 0, 2)


def test_single_expert_and_flat_scores_give_no_nan() -> None:
    assert replaceability(torch.zeros(1, 1)).tolist() == [0.0]
    assert min_max(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("rate", "pool", "wanted"), [(0.0, 64, 64), (0.25, 64, 48), (0.5, 7, 4), (0.99, 8, 1)]
)
def test_number_kept(rate: float, pool: int, wanted: int) -> None:
    assert kept(pool, rate) == wanted == max(1, round((1 - rate) * pool))
    more = [kept(pool, step / 20) for step in range(20)]
    assert all(a >= b for a, b in pairwise(more))


def test_experts_without_gate_compare_up_and_down() -> None:
    experts = nn.Module()
    experts.up_proj = nn.Parameter(torch.randn(2, WIDTH, H))
    experts.down_proj = nn.Parameter(torch.randn(2, H, WIDTH))
    experts.is_transposed = False
    weights = ScopeWeights({0: LoadedLayer(experts)}, matrix_views(experts))
    assert weights.matrices() == ("up", "down")
    assert distances(weights)[0, 1] > 0
