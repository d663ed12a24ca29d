"""Keys and values in 8 bits, as the plan counts and chooses them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conmoe_edge.errors import DoesNotFit, UnsupportedModel, UsageError
from conmoe_edge.model.anatomy import KVLayer, ModelAnatomy
from conmoe_edge.model.kv_rows import row_bytes
from conmoe_edge.plan.kv_precision import has_int8, with_kv
from conmoe_edge.plan.needs import needs_of
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serialise import plan_from_json, plan_to_json
from conmoe_edge.units import MIB

AUTO = PlanRequest(kv_precision="auto", dense_precision="source")


@pytest.fixture(scope="module")
def packable(olmoe: ModelAnatomy) -> ModelAnatomy:
    """OLMoE with 16 heads of 128 a layer."""
    kv = tuple(replace(one, packed=2 * 16 * row_bytes(128)) for one in olmoe.kv)
    return replace(olmoe, kv=kv)


def test_eight_bits_and_a_step_for_every_32_numbers(packable: ModelAnatomy) -> None:
    packed = with_kv(packable, "int8")
    assert packed.kv_bytes(4096) == 16 * 4096 * 2 * 16 * (128 + 4)
    assert packable.kv_bytes(4096) == 16 * 4096 * 2 * 16 * 256
    assert with_kv(packed, "source") == packable


def test_expanding_one_layer_counts_as_much_as_copying_it(packable: ModelAnatomy) -> None:
    """A layer in 8 bits is expanded where many tokens look at it."""
    plain, packed = [needs_of(with_kv(packable, one), "cpu", 4096) for one in ("source", "int8")]
    assert packed.workspace(64) == plain.workspace(64)
    assert plain.cache.nbytes - packed.cache.nbytes == 16 * 4096 * 2 * 16 * (256 - 132)
    assert packed.cache.note == "one conversation, in 8 bits"


def test_a_window_bounds_it(packable: ModelAnatomy) -> None:
    layer = KVLayer(8192, 0, 128, packed=4224, in_int8=True)
    assert layer.nbytes(4096) == 4224 * (128 + 512)
    assert layer.expanded(4096) == 8192 * (128 + 512)


def test_what_keeps_something_else_is_refused_by_its_layer(packable: ModelAnatomy) -> None:
    hybrid = replace(packable, kv=(packable.kv[0], KVLayer(0, 9999), *packable.kv[2:]))
    assert has_int8(packable) and not has_int8(hybrid)
    with pytest.raises(UnsupportedModel, match="OlmoeForCausalLM") as error:
        with_kv(hybrid, "int8")
    assert "layer 1" in error.value.why


def test_auto_keeps_such_a_model_as_it_is(packable: ModelAnatomy, budget) -> None:
    hybrid = replace(packable, kv=(packable.kv[0], KVLayer(0, 9999), *packable.kv[2:]))
    assert make_plan(hybrid, budget("4GB", "cpu")).kv_precision == "source"
    with pytest.raises(UnsupportedModel):
        make_plan(hybrid, budget("4GB", "cpu"), PlanRequest(kv_precision="int8"))


def test_auto_leaves_a_model_that_fits_as_it_is(packable: ModelAnatomy, budget) -> None:
    plan = make_plan(packable, budget("40GB", "cpu"))
    assert plan.unchanged and plan.kv_precision == "source"


def test_both_are_chosen_somewhere(packable: ModelAnatomy, budget) -> None:
    found = {
        make_plan(packable, budget(f"{one}MB", "cpu"), AUTO).kv_precision
        for one in range(3000, 17000, 500)
    }
    assert found == {"source", "int8"}


def test_the_least_budget_works_and_a_byte_less_does_not(packable: ModelAnatomy, budget) -> None:
    from conmoe_edge.units import parse_size

    with pytest.raises(DoesNotFit) as error:
        make_plan(packable, budget("1GB", "cpu"), AUTO)
    word = error.value.fix.split()[1]
    least = parse_size(word)
    assert least is not None
    assert make_plan(packable, budget(word, "cpu"), AUTO).kv_precision == "int8"
    with pytest.raises(DoesNotFit):
        make_plan(packable, replace(budget(word, "cpu"), device_bytes=least - 20 * MIB), AUTO)


def test_in_a_plan_s_json(packable: ModelAnatomy, budget) -> None:
    plan = make_plan(packable, budget("6GB", "cpu"), PlanRequest(kv_precision="int8"))
    value = plan_to_json(plan)
    assert value["kv_precision"] == "int8" and plan_from_json(value) == plan
    del value["kv_precision"]  # as versions wrote it that knew no other
    assert plan_from_json(value).kv_precision == "source"


def test_a_precision_that_is_none() -> None:
    with pytest.raises(UsageError, match="int4"):
        PlanRequest(kv_precision="int4")
