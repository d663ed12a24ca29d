"""``conmoe_edge.models``, without a socket."""

from __future__ import annotations

import pytest

import conmoe_edge
from conmoe_edge.errors import UsageError

pytestmark = pytest.mark.disable_socket


def test_names_and_what_would_fit() -> None:
    rows = {row.name: row for row in conmoe_edge.models()}
    assert rows["demo"].here == "folder" and rows["demo"].report is None
    asked: list[str] = []
    planned = {row.name: row for row in conmoe_edge.models("4GB", on_plan=asked.append)}
    report = planned["demo"].report
    assert report is not None and report.plan.budget.asked == "4GB" and "demo" in asked
    assert list(planned) == list(rows)


def test_nothing_to_ask_of_the_hub() -> None:
    with pytest.raises(UsageError, match="nothing to ask"):
        conmoe_edge.models(online=True)
