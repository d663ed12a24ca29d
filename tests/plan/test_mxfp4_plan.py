"""Models whose experts are published in MXFP4: they stay so, in the bytes that they have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from conmoe_edge.checkpoint.format.forms import MX_BLOCK
from conmoe_edge.errors import UsageError
from conmoe_edge.model.anatomy import ExpertsAnatomy, ModelAnatomy
from conmoe_edge.plan.levers import (
    keeps_weights,
    precisions,
    record_bytes,
    record_parts,
    scopes,
)
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.width_levers import narrow_width, steps


def _in_mxfp4(experts: ExpertsAnatomy) -> ExpertsAnatomy:
    """4 bits a number and 8 a block."""
    parts = [replace(one, form="mxfp4", nbytes=one.nbytes // 2 * 17 // 32) for one in experts.parts]
    return replace(experts, parts=tuple(parts))


@pytest.fixture
def published(model: Callable[..., ModelAnatomy]) -> ModelAnatomy:
    """All experts in MXFP4."""
    plain = model(hidden=512, width=256, layers=4, count=16)
    layers = [
        replace(one, experts=_in_mxfp4(one.experts)) if one.experts else one for one in plain.layers
    ]
    return replace(plain, layers=tuple(layers), source_form="mxfp4")


def _first(anatomy: ModelAnatomy) -> ExpertsAnatomy:
    experts = anatomy.layers[0].experts
    assert experts is not None
    return experts


def test_records_take_what_the_checkpoint_takes(published: ModelAnatomy) -> None:
    experts = _first(published)
    assert precisions(published, "auto") == precisions(published, "source") == ("mxfp4",)
    assert keeps_weights(published, "mxfp4")
    assert record_bytes(experts, "mxfp4") == experts.expert_bytes == 3 * 512 * 256 * 17 // 32
    assert all(
        record_bytes(experts, other) > record_bytes(experts, "mxfp4")
        for other in ("int4", "int8", "bf16")
    )
    assert record_parts(experts, "mxfp4")[:2] == (
        ("gate_up_proj", (512, 256), "uint8"),
        ("gate_up_proj.scale", (16, 512), "float8_e8m0fnu"),
    )


def test_a_narrow_expert_takes_its_share_of_the_bytes(published: ModelAnatomy) -> None:
    experts = _first(published)
    assert experts.narrowed(64).expert_bytes * 4 == experts.expert_bytes


def test_other_precisions_are_had_by_asking(published: ModelAnatomy) -> None:
    assert precisions(published, "int4") == ("int4",)
    assert not keeps_weights(published, "int4")


def test_it_is_refused_for_experts_that_are_not(
    model: Callable[..., ModelAnatomy], published: ModelAnatomy
) -> None:
    plain = model(hidden=512, width=256)
    mixed = replace(published, layers=(plain.layers[0], *published.layers[1:]))
    for anatomy in (plain, mixed):
        assert "mxfp4" not in precisions(anatomy, "auto")
        assert not keeps_weights(anatomy, "mxfp4")
        with pytest.raises(UsageError, match="published in MXFP4") as caught:
            precisions(anatomy, "mxfp4")
        assert caught.value.fix == "--precision int4"


def test_scopes_join_layers_however_they_are_stored(
    model: Callable[..., ModelAnatomy], published: ModelAnatomy
) -> None:
    plain = model(hidden=512, width=256)
    mixed = replace(published, layers=(plain.layers[0], *published.layers[1:]))
    assert scopes(mixed, 2) == ((0, 1), (2, 3))


def test_neurons_go_a_block_at_a_time(published: ModelAnatomy) -> None:
    experts = _first(published)
    for width in (*steps(experts, "mxfp4"), narrow_width(experts, 0.25, "mxfp4")):
        assert width % MX_BLOCK == 0
        assert record_parts(experts.narrowed(width), "mxfp4")[2][2] == "uint8"
    assert len(steps(experts, "mxfp4")) == 4


def test_kept_whole_and_said_so(published: ModelAnatomy, budget: Callable[..., object]) -> None:
    plan = make_plan(published, budget("24GB"))  # pyright: ignore[reportArgumentType]
    assert not plan.unchanged  # a link would be expanded in memory
    assert (plan.chosen.precision, plan.chosen.rate) == ("mxfp4", 0.0)
    assert plan.chosen.reason == "fits in MXFP4 as published, nothing is removed"
    assert plan.disk_bytes == published.total_bytes


def test_a_rate_that_was_asked_for_stays_in_mxfp4(
    published: ModelAnatomy, budget: Callable[..., object]
) -> None:
    plan = make_plan(published, budget("24GB"), PlanRequest(rate=0.25), trims=True)  # pyright: ignore[reportArgumentType]
    assert (plan.chosen.precision, plan.chosen.rate) == ("mxfp4", 0.25)
    assert {one.precision for one in plan.candidates} == {"mxfp4"}
