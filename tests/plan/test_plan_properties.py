"""What holds for every model and every budget."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.errors import DoesNotFit
from conmoe_edge.memory.budget import Budget
from conmoe_edge.plan.least import least_size
from conmoe_edge.plan.needs import needs_of
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.units import parse_size

_DEVICES = st.sampled_from(("cpu", "cuda"))
_SHAPES = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 12),
        "hidden": st.sampled_from((64, 256, 1024)),
        "width": st.sampled_from((32, 512, 1536)),
        "count": st.integers(1, 64),
        "top_k": st.integers(1, 8),
        "vocab": st.sampled_from((256, 32_000)),
        "dtype": st.sampled_from(("bfloat16", "float32")),
        "max_context": st.sampled_from((64, 1000, 4096)),
    }
)
_LEVERS = st.fixed_dictionaries(
    {
        "rate": st.one_of(st.just("auto"), st.sampled_from((0.0, 0.25, 0.3, 0.75, 0.99))),
        "scope": st.sampled_from(("auto", 1, 2, 4)),
        "precision": st.sampled_from(
            ("auto", "source", "bf16", "bf16+int8", "int8", "int8+int4", "int4", "lowrank")
        ),
        "prefer": st.sampled_from(("quality", "speed")),
    }
)


def _budget(nbytes: int, device: str) -> Budget:
    assert device in ("cpu", "cuda")
    return Budget(device=device, device_bytes=nbytes, asked=f"{nbytes}B", source="test")


@given(_SHAPES, _LEVERS, _DEVICES, st.integers(0, 6 * 10**9))
@settings(max_examples=150, deadline=None)
def test_a_plan_adds_up_and_stays_inside(model, shape, levers, device, nbytes):
    anatomy = model(**shape)
    try:
        plan = make_plan(anatomy, _budget(nbytes, device), PlanRequest(**levers))
    except DoesNotFit:
        return
    chosen = plan.chosen
    assert plan.device_bytes_used <= nbytes
    terms = sum(term.nbytes for term in plan.terms)
    assert plan.left_for_prototypes == nbytes - terms
    assert plan.device_bytes_used == terms + chosen.resident_bytes
    assert chosen.resident_bytes <= plan.left_for_prototypes
    assert all(term.nbytes >= 0 for term in plan.terms)
    assert min(chosen.prototypes, shape["layers"]) <= chosen.slots <= chosen.prototypes
    assert chosen.resident_share == chosen.slots / chosen.prototypes
    assert [one for one in plan.candidates if one.verdict == "chosen"] == [chosen]
    assert all(one.reason for one in plan.candidates)
    longest = 512 if chosen.slots == chosen.prototypes else 2048
    assert 1 <= plan.prefill_chunk <= min(longest, plan.context)
    (workspace,) = (term.nbytes for term in plan.terms if term.name == "Workspace")
    assert needs_of(anatomy, device, plan.context).workspace(plan.prefill_chunk) <= workspace
    assert plan.unchanged <= (chosen.rate == 0 and chosen.slots == chosen.prototypes)


@given(_SHAPES, _LEVERS, _DEVICES, st.integers(0, 6 * 10**9), st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_more_memory_is_never_worse(model, shape, levers, device, nbytes, more):
    anatomy = model(**shape)
    try:
        small = make_plan(anatomy, _budget(nbytes, device), PlanRequest(**levers))
    except DoesNotFit:
        return
    large = make_plan(anatomy, _budget(nbytes + more, device), PlanRequest(**levers))
    assert large.chosen.rate <= small.chosen.rate
    for before, after in zip(small.candidates, large.candidates, strict=True):
        assert after.slots >= before.slots
        assert after.resident_share >= before.resident_share
    assert large.unchanged >= small.unchanged


@given(_SHAPES, _LEVERS, _DEVICES, st.integers(0, 2 * 10**9))
@settings(max_examples=150, deadline=None)
def test_the_suggested_changes_work_and_are_the_smallest(model, shape, levers, device, nbytes):
    anatomy = model(**shape)
    try:
        make_plan(anatomy, _budget(nbytes, device), PlanRequest(**levers))
        return
    except DoesNotFit as error:
        fix = error.fix
        assert error.exit_code == 3
    match = re.match(r"--gpu (\S+) is the least that works", fix)
    assert match is not None
    least = parse_size(match[1])
    assert least is not None
    make_plan(anatomy, _budget(least, device), PlanRequest(**levers))
    with pytest.raises(DoesNotFit):
        make_plan(anatomy, _budget(least * 99 // 100, device), PlanRequest(**levers))
    shorter = re.search(r"--context (\d+)", fix)
    if shorter is not None:
        tokens = int(shorter[1])
        make_plan(anatomy, _budget(nbytes, device), PlanRequest(context=tokens, **levers))
        if tokens + 64 <= shape["max_context"]:
            with pytest.raises(DoesNotFit):
                make_plan(
                    anatomy, _budget(nbytes, device), PlanRequest(context=tokens + 64, **levers)
                )


@given(st.integers(1, 10**13))
def test_least_size_is_enough_and_tight(count):
    parsed = parse_size(least_size(count))
    assert parsed is not None
    assert count <= parsed
    assert parsed * 99 // 100 < count or parsed < 10**6


def test_olmoe_in_2_gb_says_what_would_do(olmoe):
    with pytest.raises(DoesNotFit) as caught:
        make_plan(olmoe, Budget("cuda", 2 * 10**9, "2GB", "test"))
    error = caught.value
    assert "2GB" in error.what
    assert "Dense weights 0.89" in error.why and "the budget is 1.86 GiB" in error.why
    assert re.fullmatch(
        r"--gpu 2\.\d\dGB is the least that works; or --context \d+, which fits", error.fix
    )


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_one_slot_a_layer_runs(olmoe, device):
    with pytest.raises(DoesNotFit) as caught:
        make_plan(olmoe, Budget(device, 10**9, "1GB", "test"), PlanRequest(precision="source"))
    match = re.match(r"--gpu (\S+) ", caught.value.fix)
    assert match is not None
    least = parse_size(match[1])
    assert least is not None
    plan = make_plan(
        olmoe, Budget(device, least, match[1], "test"), PlanRequest(precision="source")
    )
    assert plan.chosen.slots == 16 and plan.prefill_chunk == 32
