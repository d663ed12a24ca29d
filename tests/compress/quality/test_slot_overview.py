"""What a package says of its router slots, against the whole matrix of distances."""

from __future__ import annotations

import pytest
from families import tiny_model

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.compress.quality.slot_overview import overview_of, slot_distances
from conmoe_edge.compress.solvers.weight_distance import distances
from conmoe_edge.compress.stats.statistics import LayerStatistics
from conmoe_edge.compress.stream.scope_weights import LoadedLayer, ScopeWeights, matrix_views
from conmoe_edge.model.experts import find_experts


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_distances_are_those_of_the_matrix(family: str) -> None:
    experts = {
        layer: module
        for layer, (_, module) in find_experts(tiny_model(family)).items()
        if layer < 2
    }
    layers = {layer: LoadedLayer(module) for layer, module in experts.items()}
    weights = ScopeWeights(layers, matrix_views(experts[0]))
    matrix = distances(weights)
    pool = [ExpertId(layer, e) for layer in sorted(layers) for e in range(layers[layer].experts)]
    assert len(pool) == 16
    # Into the other layer, within one's own, to oneself, and nowhere.
    targets = [(3 * number + 5) % 16 for number in range(15)]
    targets[4] = 4
    slots = [SlotRecord(pool[target], 0.5) for target in targets] + [SlotRecord(None, constant=0)]
    found = slot_distances(pool, slots, weights)
    flat = [*found["0"], *found["1"]]
    assert len(found["0"]) == len(found["1"]) == 8
    assert flat[15] is None and flat[4] == 0.0
    for number, target in enumerate(targets):
        assert flat[number] == pytest.approx(float(matrix[number, target]), rel=1e-4)


def test_shares_are_of_all_layers_and_missing_distances_are_none() -> None:
    statistics = {
        2: LayerStatistics((1.0, 1.0), (1.0, 2.0), (4, 5)),
        7: LayerStatistics((1.0, 1.0), (0.0, 5.0), (0, 9)),
    }
    found = overview_of(statistics, {"7": [0.0, 1.25]})
    assert found[2].weights == (0.125, 0.25) and found[7].weights == (0.0, 0.625)
    assert found[2].tokens == (4, 5)
    assert found[2].distances == (None, None) and found[7].distances == (0.0, 1.25)


def test_a_layer_that_saw_nothing_has_no_share() -> None:
    found = overview_of({0: LayerStatistics((0.0,), (0.0,), (0,))}, {})
    assert found[0].weights == (0.0,)
