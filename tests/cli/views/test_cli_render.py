"""Plans, receipts and findings as text: real plans of a hand-made model, read line by line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from conmoe_edge.api import PlanReport
from conmoe_edge.api.finding import Finding
from conmoe_edge.cli.views.plan_views import (
    budget_line,
    finding_view,
    model_line,
    plan_view,
    receipt_view,
    shown_candidates,
    table_view,
)
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import (
    ExpertPart,
    ExpertsAnatomy,
    KVLayer,
    LayerAnatomy,
    ModelAnatomy,
)
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.units import GIB, MIB, human_size, parse_size

_HIDDEN, _WIDTH = 2048, 1024


def olmoe() -> ModelAnatomy:
    """Shapes of OLMoE-1B-7B."""
    parts = (
        ExpertPart("gate_up_proj", (2 * _WIDTH, _HIDDEN), "bfloat16", 4 * _WIDTH * _HIDDEN),
        ExpertPart("down_proj", (_HIDDEN, _WIDTH), "bfloat16", 2 * _WIDTH * _HIDDEN),
    )
    layers = tuple(
        LayerAnatomy(i, 34 * MIB, ExpertsAnatomy(f"model.layers.{i}.mlp.experts", 64, 8, parts))
        for i in range(16)
    )
    kv = tuple(KVLayer(8192) for _ in layers)
    return ModelAnatomy(
        "olmoe", "OlmoeForCausalLM", "bfloat16", _HIDDEN, 50304, 4096, layers, 400 * MIB, kv
    )


def planned(asked: str, **levers: Any) -> Plan:
    size = parse_size(asked)
    assert size is not None
    return make_plan(olmoe(), Budget("cpu", size, asked, "a test"), PlanRequest(**levers))


def text(view: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(view)
    return "\n".join(line.rstrip() for line in capture.get().split("\n"))


def shown(plan: Plan) -> str:
    report = PlanReport("owner/[bold]model", olmoe(), plan)
    return text(plan_view(report, Path("out"), 212 * GIB))


def test_the_sum_is_shown_term_by_term() -> None:
    plan = planned("8GB")
    lines = shown(plan).splitlines()
    for term in plan.terms:
        row = next(line for line in lines if line.strip().startswith(term.name))
        assert f"{term.nbytes / GIB:.2f}" in row
    left = next(line for line in lines if "Left for prototypes" in line)
    assert f"{plan.left_for_prototypes / GIB:.2f}" in left
    total = sum(term.nbytes for term in plan.terms) + plan.left_for_prototypes
    assert abs(total - plan.budget.device_bytes) < 1 * MIB


def test_the_chosen_row_is_marked_and_milder_ones_say_why_not() -> None:
    plan = planned("4GB")
    assert plan.chosen.rate > 0
    rows = [line for line in shown(plan).splitlines() if " %" in line and "GiB" in line]
    marked = [row for row in rows if row.startswith("❯")]
    assert len(marked) == 1
    assert f"{100 * plan.chosen.rate:g} %" in marked[0]
    assert f"{plan.chosen.prototypes:,}" in marked[0]
    assert "chosen: " in marked[0]
    before = rows[: rows.index(marked[0])]
    assert before
    assert all("slow: " in row or "too big: " in row for row in before)


def test_disk_and_names_are_taken_literally() -> None:
    out = shown(planned("8GB"))
    assert "owner/[bold]model" in out
    assert "16 MoE layers · 64 experts · top-8 · bf16" in out
    assert "./out" in out
    assert "212.00 GiB free" in out


def test_a_model_that_fits_is_said_to_fit() -> None:
    plan = planned("24GB")
    assert plan.unchanged
    out = shown(plan)
    assert (
        f"Fits unchanged: {human_size(plan.device_bytes_used)} of {human_size(plan.budget.device_bytes)}"
        in out
    )
    assert "--rate 25% does it anyway" in out
    assert "❯" not in out


def test_long_tables_keep_the_choice_and_count_the_rest() -> None:
    plan = planned("3GB", rate=0.7)
    rows, hidden = shown_candidates(plan)
    assert plan.chosen in rows
    assert rows == [c for c in plan.candidates if c in rows]
    assert len(rows) + hidden == len(plan.candidates)


@pytest.mark.parametrize(
    ("budget", "value", "note"),
    [
        (Budget("cpu", 8 * 10**9, "8GB", "you asked for 8GB = 7.45 GiB"), None, ""),
        (Budget("cuda", 8 * GIB, "rtx", "a profile"), "rtx = 8.00 GiB", "a profile"),
    ],
)
def test_the_budget_in_both_units(budget: Budget, value: str | None, note: str) -> None:
    assert budget_line(budget) == (value or budget.source, note)


def test_mixed_layers_are_a_span() -> None:
    whole = olmoe()
    first = whole.layers[0]
    assert first.experts is not None
    small = ExpertsAnatomy(first.experts.module, 8, 2, first.experts.parts)
    mixed = ModelAnatomy(
        whole.model_type,
        whole.architecture,
        whole.dtype,
        whole.hidden_size,
        whole.vocab_size,
        whole.max_context,
        (LayerAnatomy(0, 0, small), *whole.layers[1:]),
        whole.outside_bytes,
        whole.kv,
    )
    assert "8–64 experts · top-2–8" in model_line(mixed)


RECEIPT: dict[str, Any] = {
    "tokens": 8192,
    "loss_original": 3.5,
    "loss_consolidated": 3.75,
    "perplexity_ratio": 1.284,
    "kl": 0.2,
    "top1_agreement": 0.81,
    "per_domain": {"wiki": {"tokens": 4096, "kl": 0.1}, "code": {"tokens": 4096, "kl": 0.3}},
}


def test_the_receipt_by_domain() -> None:
    view = receipt_view(RECEIPT)
    assert view is not None
    lines = text(view).splitlines()
    assert lines[1].split() == ["all", "8,192", "3.500", "3.750", "×1.284", "0.2000", "81.0", "%"]
    assert [line.split()[0] for line in lines[2:4]] == ["code", "wiki"]


def test_a_receipt_with_gaps_and_none_at_all() -> None:
    assert receipt_view({}) is None
    view = receipt_view({"tokens": 12})
    assert view is not None
    assert "12" in text(view)


def test_a_finding_with_its_fix() -> None:
    lines = text(finding_view(Finding("disk", "warn", "2 GiB free", "free some"))).splitlines()
    assert lines[0].split() == ["warn", "disk", "2", "GiB", "free"]
    assert lines[1].strip() == "fix: free some"


def test_tables_keep_their_cells_on_one_line() -> None:
    lines = text(table_view(("a", "b"), [("x\ny", "1"), ("zz", "22")], frozenset({1})))
    assert len(lines.rstrip("\n").splitlines()) == 3
