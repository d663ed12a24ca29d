"""Contribution as gathered by the tap, against every token and expert computed one by one."""

from __future__ import annotations

import torch
from families import tiny_model

from conmoe_edge.compress.stats.statistics import LayerStatistics, StatisticsTracker
from conmoe_edge.compress.stream.expert_hooks import IMPLEMENTATION, RoutedTap, attach, register
from conmoe_edge.model.experts import expert_forward, find_experts, part_names


def test_contribution_equals_token_by_token_and_padding_does_not_count() -> None:
    register()
    model = tiny_model("olmoe")
    module = find_experts(model)[1][1]
    experts, top_k, width = 8, 3, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, width, generator=generator)
    index = torch.stack(
        [torch.randperm(experts - 1, generator=generator)[:top_k] for _ in range(17)]
    )
    gates = torch.rand(17, top_k, generator=generator)
    keep = torch.ones(17, dtype=torch.bool)
    keep[3:6] = False
    tap = RoutedTap()
    tap.tracker, tap.keep = StatisticsTracker(experts), keep
    attach(module, tap)
    module.config._experts_implementation = IMPLEMENTATION
    with torch.no_grad():
        out = module(hidden, index, gates)
        module.config._experts_implementation = "eager"
        assert torch.equal(out, module(hidden, index, gates))
    found = tap.tracker.result()
    for expert in range(experts):
        total, count = 0.0, 0
        for token in range(17):
            for slot in range(top_k):
                if int(index[token, slot]) == expert and keep[token]:
                    parts = {name: getattr(module, name)[expert] for name in part_names(module)}
                    with torch.no_grad():
                        norm = float(
                            expert_forward(module, hidden[token : token + 1], parts).norm()
                        )
                    total += float(gates[token, slot]) * norm
                    count += 1
        assert found.counts[expert] == count
        mean = total / count if count else 0.0
        torch.testing.assert_close(found.contribution()[expert].item(), mean, rtol=1e-5, atol=1e-7)
    # The last expert was never routed to.
    assert found.counts[experts - 1] == 0 and found.contribution()[experts - 1] == 0.0
    assert torch.isfinite(found.contribution()).all()


def test_statistics_survive_json_exactly() -> None:
    import json

    one = LayerStatistics((0.1, 1 / 3), (2.0, 1e-300), (3, 0))
    assert LayerStatistics.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_weight_below_zero_counts_by_its_size() -> None:
    """Gemma-4 multiplies the weights of an expert by a trained number: what it gives then counts no less."""
    gates, outputs = torch.tensor([0.5, 0.25]), torch.ones(2, 4)
    above, below = StatisticsTracker(1), StatisticsTracker(1)
    above.add(0, gates, outputs, None)
    below.add(0, -gates, outputs, None)
    assert below.result() == above.result()
    assert below.result().gates == (0.75,)
