"""What the levers mean for one model: scopes, counts, room and layouts agree with each other and with the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import tiny_model

from conmoe_edge.checkpoint.format.manifest import ExpertId
from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.run.journal import StoredRecord
from conmoe_edge.compress.run.record_sizes import RecordSizes
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.probe import probe
from conmoe_edge.plan.levers import PRECISIONS, kept, scopes
from conmoe_edge.plan.width_levers import PARTS


def anatomy() -> ModelAnatomy:
    """Five MoE layers of the tiny model's own."""
    found = probe(tiny_model("qwen3_moe").config)
    layer = found.moe_layers[0]
    return replace(found, layers=tuple(replace(layer, index=index) for index in range(5)))


def sizes_of(
    method: str = "conmoe", scope: int = 2, precision: str = "source", differs: bool = False
) -> RecordSizes:
    model = anatomy()
    return RecordSizes(
        anatomy=model,
        narrow=model,
        rate=0.5,
        precision=precision,
        kinds=PRECISIONS[precision].kinds,
        scopes=scopes(model, scope),
        trims=False,
        differs=differs,
        shares_out=METHODS[method].budgets,
        wide=7,
    )


def test_every_layer_stands_in_one_scope_and_every_expert_in_one_pool() -> None:
    sizes = sizes_of()
    assert sizes.scopes == ((0, 1), (2, 3), (4,))
    assert [sizes.scope_of(layer) for layer in range(5)] == [(0, 1), (0, 1), (2, 3), (2, 3), (4,)]
    count = sizes.experts(0).count
    pools = [expert for scope in sizes.scopes for expert in sizes.pool(scope)]
    assert pools == [ExpertId(layer, expert) for layer in range(5) for expert in range(count)]


def test_counts_are_the_plans_unless_a_budget_says_otherwise() -> None:
    sizes = sizes_of()
    pool = len(sizes.pool((0, 1)))
    assert sizes.uniform((0, 1)) == sizes.count((0, 1), {}) == kept(pool, 0.5)
    assert sizes.count((0, 1), {"0": 3}) == 3 and sizes.count((2, 3), {"0": 3}) == kept(pool, 0.5)


def test_wide_records_are_spread_over_all_scopes() -> None:
    sizes = sizes_of(precision="bf16+int8")
    given = [sizes.wide_count(scope, {}) for scope in sizes.scopes]
    assert sum(given) == 7 and max(given) - min(given) <= 1


@pytest.mark.parametrize("taken", [1, 2])
def test_what_a_scope_leaves_is_room_for_the_next(taken: int) -> None:
    sizes = sizes_of("auto", scope=1, differs=True)
    unit, budgets = sizes.unit(0), {"0": 2 * PARTS, "1": 3 * PARTS}
    width = sizes.widths(0)[-1]
    record = sizes.layout(0, sizes.kinds[0], width).nbytes
    assert record == sizes.sizes(0)[-1] == unit * PARTS
    stored = {
        ExpertId(0, expert): StoredRecord("file", 0, sizes.kinds[0], width)
        for expert in range(taken)
    }
    assert sizes.room((0,), budgets, {}) == 2 * record
    assert sizes.room((1,), budgets, stored) == (2 + 3 - taken) * record
