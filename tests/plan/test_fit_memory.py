"""What a fit takes of this machine's RAM, as the plan says it."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.compress.work.side_by_side import MOST
from conmoe_edge.plan.fit_memory import AT_A_TIME, fit_memory, most_tokens
from conmoe_edge.plan.needs import PYTHON_BYTES
from conmoe_edge.units import GIB

OLMOE: dict[str, int] = {"hidden": 2048, "width": 1024, "count": 64, "top_k": 8, "vocab": 50304}
QWEN: dict[str, int] = {"hidden": 2048, "width": 768, "count": 128, "top_k": 8, "vocab": 151936}


def need(anatomy: Any, tokens: int = 32768, **changed: Any):
    given = {
        "trims": True,
        "precision": "free",
        "dense": "source",
        "surveys": False,
        "wide": 2,
        "on_host": True,
        **changed,
    }
    return fit_memory(anatomy, tokens, **given)


def test_auto_on_olmoe_by_hand(model) -> None:
    found = need(model(layers=16, **OLMOE))
    assert found.moment == "decide"
    tokens, hidden, width, count, routed = 32768, 2048, 1024, 64, 32768 * 8
    layer = count * 3 * hidden * width * 2 + 4 * hidden * hidden * 2 + (4 + count) * hidden * 2
    terms = {term.name: term.nbytes for term in found.terms}
    assert terms.pop("Python and libraries") == PYTHON_BYTES
    assert terms.pop("Hidden states") == (2 * tokens + tokens // 4) * hidden * 2
    assert terms.pop("One layer") == layer
    assert terms.pop("Tokens of the layer") == tokens * (hidden * 2 + 12 * 8 + 8 * count)
    assert terms.pop("Target") == tokens * hidden * 4
    assert terms.pop("Activations") == routed * width * 2
    assert terms.pop("Gram matrices") == count * width * width * 4
    assert terms.pop("Down projections") == count * hidden * width * 4
    assert terms.keys() == {"Rounded", "Work space"}
    assert found.nbytes < 5 * GIB


@pytest.mark.parametrize("shape", [OLMOE, QWEN])
def test_nothing_grows_with_the_depth(model, shape: dict[str, int]) -> None:
    assert need(model(layers=2, **shape)) == need(model(layers=48, **shape))


def test_wide_numbers_and_other_methods(model) -> None:
    olmoe = model(layers=2, **OLMOE)
    assert need(olmoe, wide=4).nbytes > need(olmoe).nbytes + GIB // 2
    plain = need(olmoe, trims=False, precision="source")
    assert plain.nbytes < need(olmoe, trims=False, precision="int4", tokens=1 << 17).nbytes
    assert plain.nbytes < need(olmoe).nbytes
    assert need(olmoe, surveys=True, tokens=512).moment == "survey"
    assert "survey" not in need(olmoe).moments
    assert need(olmoe, on_host=False).nbytes < need(olmoe).nbytes


def test_a_large_vocabulary_counts_where_it_is_loaded(model) -> None:
    """Qwen3's vocabulary beside layers of few experts: embeddings and head are most of what there is at one time."""
    few = model(layers=2, **{**QWEN, "count": 8})
    found = need(few, 512, wide=4)
    tables, scores = 2 * 151936 * 2048, 151936 * (2 * 512 * 4 + 4 * 6 * 64)
    assert found.moment == "receipt" and found.nbytes == found.moments["receipt"]
    terms = {term.name: term.nbytes for term in found.terms}
    assert terms["Outside of the layers"] == 4 * tables + 2048 * 4
    assert terms["Hidden states"] == 2 * 512 // 4 * 2048 * 4
    assert terms["Scores"] == scores
    kept = terms["Work space"]
    assert found.moments["outside"] == PYTHON_BYTES + 4 * tables + 2048 * 4 + tables + kept
    rounded = need(few, 512, wide=4, dense="q4")  # the package's own head, and the original's
    assert rounded.nbytes == found.nbytes + 4 * tables + 2048 * 4
    assert need(few, 512, wide=4, on_host=False).moments["receipt"] < PYTHON_BYTES + GIB // 4


def test_how_many_tokens_there_is_room_for(model) -> None:
    olmoe = model(layers=2, **OLMOE)
    limit = need(olmoe, 8192).nbytes
    assert most_tokens(limit, 32768, lambda count: need(olmoe, count)) == 8192
    assert most_tokens(limit - 1, 32768, lambda count: need(olmoe, count)) == 8192 - 512
    assert most_tokens(limit, 4096, lambda count: need(olmoe, count)) == 4096
    assert most_tokens(GIB // 2, 32768, lambda count: need(olmoe, count)) == 0


def test_experts_side_by_side_are_counted() -> None:
    assert AT_A_TIME == MOST
