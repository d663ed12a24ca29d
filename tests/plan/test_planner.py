"""Which levers are taken, and what is said about those that are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conmoe_edge.errors import UnsupportedModel, UsageError
from conmoe_edge.plan.levers import record_bytes
from conmoe_edge.plan.needs import needs_of
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.units import GIB

_DEVICES = ("cpu", "cuda")


def _rates(plan, verdict):
    return [candidate.rate for candidate in plan.candidates if candidate.verdict == verdict]


@pytest.mark.parametrize("device", _DEVICES)
def test_olmoe_fits_unchanged_in_24_gb(olmoe, budget, device):
    plan = make_plan(olmoe, budget("24GB", device))
    assert plan.unchanged and plan.chosen.rate == 0 and plan.chosen.resident_share == 1
    assert "unchanged" in plan.chosen.reason
    assert 13.9 < plan.device_bytes_used / GIB < 14.1
    assert plan.disk_bytes == olmoe.dense_bytes + 12 * GIB
    assert plan.prefill_chunk == 512


@pytest.mark.parametrize("device", _DEVICES)
def test_olmoe_in_its_own_numbers_in_8_gb_is_halved_and_mostly_resident(olmoe, budget, device):
    plan = make_plan(olmoe, budget("8GB", device), PlanRequest(precision="source"))
    assert plan.chosen.rate == 0.5 and plan.chosen.prototypes == 512
    assert 0.89 < plan.chosen.resident_share < 0.92
    assert _rates(plan, "slow") == [0, 0.125, 0.25, 0.375]
    assert "resident" in plan.candidates[0].reason
    assert ("disk" in plan.candidates[0].reason) == (device == "cpu")
    assert plan.disk_bytes == olmoe.dense_bytes + 6 * GIB


@pytest.mark.parametrize("device", _DEVICES)
def test_what_stays_offloaded_is_read_in_longer_chunks(olmoe, budget, device):
    """They cost slots, never experts, and fewer of them than a thirty-second of what is offloaded."""
    asked = PlanRequest(rate=0, precision="source", kv_precision="source", min_resident=0.4)
    plan = make_plan(olmoe, budget("8GB", device), asked)
    (workspace,) = (term.nbytes for term in plan.terms if term.name == "Workspace")
    needs = needs_of(olmoe, device, plan.context)
    assert plan.prefill_chunk == 2048 and workspace == needs.longest
    assert 0.4 < plan.chosen.resident_share < 0.5
    nearly = make_plan(olmoe, budget("14GB", device), asked)
    offloaded = nearly.chosen.pool_bytes - nearly.chosen.resident_bytes
    (workspace,) = (term.nbytes for term in nearly.terms if term.name == "Workspace")
    assert 512 <= nearly.prefill_chunk < 2048
    assert workspace - needs.largest <= offloaded / 32
    assert make_plan(olmoe, budget("24GB", device), asked).prefill_chunk == 512


@pytest.mark.parametrize("share", (0.44, 0.45, 0.46, 0.47))
def test_the_wanted_share_comes_before_longer_chunks(olmoe, budget, share):
    asked = PlanRequest(
        rate=0,
        precision="source",
        kv_precision="source",
        dense_precision="source",
        min_resident=share,
    )
    plan = make_plan(olmoe, budget("8GB"), asked)
    needs = needs_of(olmoe, "cuda", plan.context)
    room = plan.budget.device_bytes - needs.fixed(12 << 20)
    if share * (12 << 30) <= room - needs.smallest - (12 << 20):
        assert plan.chosen.resident_share >= share
        assert plan.prefill_chunk < 2048
    else:
        assert plan.prefill_chunk == 2048


@pytest.mark.parametrize("device", _DEVICES)
def test_olmoe_in_4_gb_stops_at_half_and_says_so(olmoe, budget, device):
    plan = make_plan(olmoe, budget("4GB", device), PlanRequest(precision="source"))
    assert plan.chosen.rate == 0.5 and not plan.unchanged
    assert 140 <= plan.chosen.slots <= 150
    assert plan.chosen.reason.startswith("the most that is removed unasked")


def test_mostly_resident_without_removal_is_milder_than_removal(olmoe, budget):
    plan = make_plan(olmoe, budget("14GB"))
    assert plan.chosen.rate == 0 and not plan.unchanged
    assert 0.8 <= plan.chosen.resident_share < 1
    faster = make_plan(olmoe, budget("14GB"), PlanRequest(prefer="speed", precision="source"))
    assert faster.chosen.rate == 0.125 and faster.chosen.resident_share == 1
    narrower = make_plan(olmoe, budget("14GB"), PlanRequest(prefer="speed"))
    assert (narrower.chosen.precision, narrower.chosen.rate) == ("int8", 0)
    assert narrower.chosen.reason == "fits at 8 bits, nothing is removed"


@pytest.mark.parametrize("device", _DEVICES)
def test_fewer_bits_come_before_fewer_experts(olmoe, budget, device):
    sizes = ("24GB", "10GB", "6.5GB", "5.5GB", "4GB")
    chosen = [make_plan(olmoe, budget(size, device)).chosen for size in sizes]
    ladder = ["source", "int8", "int8+int4", "int4", "int4"]
    assert [one.precision for one in chosen] == ladder
    assert [one.rate for one in chosen[:4]] == [0, 0, 0, 0] and chosen[4].rate > 0
    assert all("nothing is removed" in one.reason for one in chosen[:3])


def test_a_mix_makes_everything_resident_and_fills_the_room(olmoe, budget):
    plan = make_plan(olmoe, budget("6.5GB"))
    chosen = plan.chosen
    experts = olmoe.layers[0].experts
    wide, narrow = record_bytes(experts, "int8"), record_bytes(experts, "int4")
    many = chosen.wide_prototypes
    assert 0 < many < 1024 and chosen.slots == chosen.prototypes == 1024
    assert chosen.pool_bytes == many * wide + (1024 - many) * narrow == chosen.resident_bytes
    assert 0 <= plan.left_for_prototypes - chosen.pool_bytes < wide - narrow
    assert plan.prefill_chunk == 512
    assert f"{many} of 1,024 prototypes at 8 bits, the others at 4" in chosen.reason


def test_a_forced_mix_without_room_is_the_narrow_one(olmoe, budget):
    plan = make_plan(olmoe, budget("4GB"), PlanRequest(precision="int8+int4"))
    assert plan.chosen.precision == "int8+int4" and plan.chosen.wide_prototypes == 0
    assert plan.chosen.record_bytes == record_bytes(olmoe.layers[0].experts, "int4")
    whole = make_plan(olmoe, budget("24GB"), PlanRequest(precision="int8+int4")).chosen
    assert whole.wide_prototypes == whole.prototypes
    assert whole.reason == "fits at 8 bits, nothing is removed"


def test_what_is_not_taken_says_why(olmoe, budget):
    tight = {c.precision: c for c in make_plan(olmoe, budget("5.5GB")).candidates if not c.rate}
    assert tight["int8+int4"].verdict == "fits"
    assert tight["int8+int4"].reason == "leaves no room for a prototype at 8 bits, so it is int4"
    roomy = {c.precision: c for c in make_plan(olmoe, budget("14GB")).candidates if not c.rate}
    assert roomy["int4"].reason == "would do, but with fewer bits than are needed"


def test_a_forced_rate_is_obeyed_when_slow_and_when_needless(olmoe, budget):
    slow = make_plan(olmoe, budget("4GB"), PlanRequest(rate=0.25, precision="source"))
    assert slow.chosen.rate == 0.25 and slow.chosen.resident_share < 0.2
    assert slow.chosen.reason.startswith("you asked for 25 %; ")
    needless = make_plan(olmoe, budget("24GB"), PlanRequest(rate=0.25, precision="source"))
    assert needless.chosen.rate == 0.25 and not needless.unchanged
    assert needless.chosen.reason == "you asked for 25 %"
    assert _rates(needless, "fits") == [0, 0.125]
    assert needless.candidates[0].reason == "would do, but you asked for 25 %"


def test_a_forced_rate_beyond_the_grid(olmoe, budget):
    plan = make_plan(olmoe, budget("4GB"), PlanRequest(rate=0.9, precision="int4"))
    assert plan.chosen.prototypes == 16 * 6
    assert [candidate.rate for candidate in plan.candidates][-2:] == [0.75, 0.9]


def test_forced_zero_runs_from_the_backing_tier(olmoe, budget):
    plan = make_plan(olmoe, budget("4GB"), PlanRequest(rate=0, precision="source"))
    assert plan.chosen.rate == 0 and not plan.unchanged and len(plan.candidates) == 1
    assert plan.chosen.verdict == "chosen"


def test_a_forced_scope_counts_over_the_pool(model, budget):
    anatomy = model(layers=5, count=5)
    plan = make_plan(anatomy, budget("1GB"), PlanRequest(rate=0.5, scope=2))
    assert plan.chosen.scope == 2 and plan.chosen.prototypes == 5 + 5 + 2
    assert make_plan(anatomy, budget("1GB"), PlanRequest(rate=0.5)).chosen.prototypes == 5 * 2


def test_float32_is_narrowed_before_experts_are_removed(model, budget):
    anatomy = model(layers=16, hidden=512, width=512, count=64, dtype="float32")
    plan = make_plan(anatomy, budget("2.8GB"))
    assert (plan.chosen.precision, plan.chosen.rate) == ("bf16", 0)
    assert not plan.unchanged
    assert [candidate.precision for candidate in plan.candidates[:2]] == ["source", "bf16"]
    kept = make_plan(anatomy, budget("2.8GB"), PlanRequest(precision="source"))
    assert kept.chosen.precision == "source" and kept.chosen.rate > 0
    assert make_plan(anatomy, budget("8GB")).unchanged


def test_bf16_of_a_bf16_model_is_unchanged(olmoe, budget):
    assert make_plan(olmoe, budget("24GB"), PlanRequest(precision="bf16")).unchanged


def test_layers_of_unequal_shape_get_slots_of_the_largest_record(model, budget):
    anatomy = model(layers=3)
    wide = model(layers=3, width=512).layers[1]
    mixed = replace(anatomy, layers=(anatomy.layers[0], wide, anatomy.layers[2]))
    plan = make_plan(mixed, budget("1GB"), PlanRequest(precision="source"))
    assert plan.chosen.record_bytes == 3 * 512 * 64 * 2
    assert plan.chosen.pool_bytes == 8 * (3 * 512 * 64 * 2) + 16 * 12288
    assert plan.unchanged


def test_min_resident_moves_the_rate(olmoe, budget):
    loose = make_plan(olmoe, budget("8GB"), PlanRequest(min_resident=0.5, precision="source"))
    assert loose.chosen.rate == 0.125
    assert "50 %" in loose.chosen.reason
    assert make_plan(olmoe, budget("8GB"), PlanRequest(min_resident=0.0)).chosen.rate == 0


def test_context_defaults_to_what_the_model_can_read(model, budget):
    assert make_plan(model(max_context=512), budget("1GB")).context == 512
    assert make_plan(model(max_context=99_999), budget("1GB")).context == 4096
    short = make_plan(model(), budget("1GB"), PlanRequest(context=20))
    assert short.prefill_chunk == 20


def test_a_context_that_the_model_cannot_read_is_refused_with_a_fix(model, budget):
    with pytest.raises(UsageError) as caught:
        make_plan(model(), budget("8GB"), PlanRequest(context=4097))
    assert "--context 4096" in caught.value.fix


def test_a_dense_model_is_refused(model, budget):
    with pytest.raises(UnsupportedModel):
        make_plan(model(layers=2, dense_layers=(0, 1)), budget("8GB"))


def test_scratch_is_hidden_states_and_what_is_found_beside_the_weights(olmoe, budget):
    """Fp32 hidden states of two streams, or four; constants in bf16 twice; a predictor where some wait outside."""
    hidden, slots, streams = 2048, 16 * 64, 2 * 1000 * 2048 * 4
    constants, predictor = 2 * slots * hidden * 2, slots * (hidden + 1) * 6 + 2 * 1000 * hidden * 2
    asked = PlanRequest(calibration_tokens=1000)
    some, everything = budget("8GB"), budget("40GB")
    assert make_plan(olmoe, some, asked).chosen.resident_share < 1
    assert make_plan(olmoe, some, asked).scratch_bytes == streams + predictor
    trimmed = make_plan(olmoe, some, asked, trims=True)
    assert trimmed.scratch_bytes == 2 * streams + constants + predictor
    assert make_plan(olmoe, everything, asked).scratch_bytes == streams
