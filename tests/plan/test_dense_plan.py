"""The dense term with matrices in fewer bits, where it leads, and when it is chosen unasked."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from conmoe_edge.errors import DoesNotFit
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import DenseMatrix
from conmoe_edge.plan.dense_precision import read_by_kind, stored
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.serialise import plan_from_json, plan_to_json
from conmoe_edge.plan.speed import REACH, expected_seconds, planned_step
from conmoe_edge.units import MIB, parse_size


def test_int8_bytes_by_hand(with_matrices) -> None:
    saved = 64 * (2048 * 2048 - 2 * 2048) + 50304 * 2048 - 2 * 50304
    small = stored(with_matrices, "int8")
    assert small.dense_bytes == with_matrices.dense_bytes - saved
    assert small.outside_bytes == with_matrices.outside_bytes - (50304 * 2048 - 2 * 50304)
    assert small.experts_bytes == with_matrices.experts_bytes
    assert stored(with_matrices, "source") is with_matrices
    assert stored(small, "int8") is small


def test_few_bits_by_hand(with_matrices) -> None:
    """Six and four bits, a byte for 32 columns and four for a row; what suits no tile is in 8 bits."""

    def per_row(bits: int) -> int:
        return 2048 * bits // 8 + 2048 // 32 + 4

    odd = DenseMatrix(None, 2048, 64, 2 * 2048 * 64, in_rows=True)
    anatomy = replace(with_matrices, dense_matrices=(*with_matrices.dense_matrices, odd))
    for precision, bits in (("q6", 6), ("q4", 4)):
        found = stored(anatomy, precision)
        saved = 64 * 2048 * (2 * 2048 - per_row(bits)) + 2048 * (64 - 2)
        saved += 50304 * (2 * 2048 - per_row(6))  # the head has 6 bits in both
        assert found.dense_bytes == anatomy.dense_bytes - saved
    with pytest.raises(ValueError, match="already"):
        stored(stored(anatomy, "q6"), "q4")


def test_where_nothing_fits_the_narrowest_is_what_is_told(with_matrices) -> None:
    asked = PlanRequest(dense_precision="auto")
    with pytest.raises(DoesNotFit) as told:
        make_plan(with_matrices, Budget("cpu", 10**8, "100MB", "test"), asked)
    (size,) = re.findall(r"--gpu (\S+)", told.value.fix)
    least = parse_size(size)
    assert least is not None
    plan = make_plan(with_matrices, Budget("cpu", least, size, "test"), asked)
    assert plan.dense_precision == "q4"


def test_plan_shows_and_counts_it(with_matrices) -> None:
    budget = Budget("cpu", 8 * 10**9, "8GB", "test")
    plain = make_plan(with_matrices, budget, PlanRequest(dense_precision="source"))
    small = make_plan(with_matrices, budget, PlanRequest(dense_precision="int8"))
    terms = {term.name: term for term in small.terms}
    assert terms["Dense weights"].nbytes == stored(with_matrices, "int8").dense_bytes
    assert "int8" in terms["Dense weights"].note
    assert "int8" not in {term.name: term for term in plain.terms}["Dense weights"].note
    assert small.left_for_prototypes > plain.left_for_prototypes + 300 * MIB
    assert (plain.dense_precision, small.dense_precision) == ("source", "int8")
    assert plan_from_json(plan_to_json(small)) == small


def test_a_plan_written_before_there_was_a_choice(with_matrices) -> None:
    asked = PlanRequest(dense_precision="source")
    plan = make_plan(with_matrices, Budget("cpu", 8 * 10**9, "8GB", "test"), asked)
    old = plan_to_json(plan)
    del old["dense_precision"]
    assert plan_from_json(old) == plan


def test_a_model_with_quantised_layers_is_not_unchanged(with_matrices) -> None:
    budget = Budget("cpu", 64 * 10**9, "64GB", "test")
    assert make_plan(with_matrices, budget).unchanged
    plan = make_plan(with_matrices, budget, PlanRequest(dense_precision="int8"))
    assert not plan.unchanged and plan.chosen.rate == 0
    assert "unchanged" not in plan.chosen.reason


@pytest.mark.parametrize("precision", ["auto", "source"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_int8_is_named_where_the_dense_part_is_what_does_not_fit(
    with_matrices, device: str, precision: str
) -> None:
    """Both budgets that the error names work, and a byte step below them does not."""
    asked = PlanRequest(precision=precision, dense_precision="source")
    small = replace(asked, dense_precision="int8")

    def fits(nbytes: int, request: PlanRequest) -> str:
        try:
            make_plan(with_matrices, Budget(device, nbytes, "it", "test"), request)  # type: ignore[arg-type]
        except DoesNotFit as error:
            return error.fix
        return ""

    plain, packed = (parse_size(found) for found in re.findall(r"--gpu (\S+)", fits(10**8, asked)))
    assert plain is not None and packed is not None and packed < plain
    assert not fits(plain, asked) and not fits(packed, small)
    assert fits(plain - 10**7, asked) and fits(packed - 10**7, small)
    assert "--dense-precision int8 fits" in fits(packed, asked)
    assert "--dense-precision" not in fits(10**8, small)


@pytest.mark.parametrize("precision", ("source", "int8", "q6", "q4"))
def test_what_a_token_reads_is_known_by_kind(with_matrices, precision) -> None:
    """A table that is looked up is not read; one that is the head too is."""
    table = DenseMatrix(None, 50304, 2048, 2 * 50304 * 2048, looked_up=True, at_an_end=True)
    whole = replace(with_matrices, dense_matrices=(*with_matrices.dense_matrices, table))
    anatomy = stored(whole, precision)
    found = read_by_kind(anatomy)
    of_table = _nbytes(50304, 2048, {"source": "plain", "q4": "q6"}.get(precision, precision))
    assert sum(found.values()) == anatomy.dense_bytes - of_table
    attention = 64 * _nbytes(2048, 2048, "plain" if precision == "source" else precision)
    head = of_table
    wanted = {"source": {"source": sum(found.values())}}.get(precision)
    if precision == "q4":
        wanted = {"q4": attention, "q6": head}
    elif wanted is None:
        wanted = {precision: attention + head}
    assert {
        kind: one for kind, one in found.items() if kind != "source" or precision == kind
    } == wanted
    norms = anatomy.dense_bytes - attention - head - of_table
    assert precision == "source" or found["source"] == norms
    tied = stored(
        replace(
            whole,
            dense_matrices=(*with_matrices.dense_matrices[:-1], table),
            outside_bytes=whole.outside_bytes - table.nbytes,
        ),
        precision,
    )
    assert sum(read_by_kind(tied).values()) == tied.dense_bytes


def test_dense_matrices_in_few_bits_reach_what_their_kernels_do(with_matrices, budget) -> None:
    small = stored(with_matrices, "int8")
    step = planned_step(small, budget("8GB", "cpu"), {}, hit_rate=1, offloaded_bytes=0)
    machine = budget("8GB", "cpu", device_bandwidth=36e9)
    reach = REACH["cpu"]
    kinds = read_by_kind(small)
    moved = kinds["int8"] / reach.kernels["int8"] + kinds["source"] / reach.kernels["source"]
    wanted = moved / 36e9 + 16 * reach.layer_seconds
    assert expected_seconds(step, machine) == pytest.approx(wanted)
    assert wanted > step.dense / (reach.kernels["source"] * 36e9) + 16 * reach.layer_seconds


def _nbytes(rows: int, columns: int, kind: str) -> int:
    if kind == "plain":
        return 2 * rows * columns
    if kind == "int8":
        return rows * columns + 2 * rows
    return rows * (columns * int(kind[1]) // 8 + columns // 32 + 4)
