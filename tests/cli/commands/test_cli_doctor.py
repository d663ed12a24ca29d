"""``doctor`` as a command: what it prints, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from conmoe_edge.api import diagnosing
from conmoe_edge.api.finding import Finding
from conmoe_edge.cli.main import main

FINDINGS = [Finding("a", "ok", "fine"), Finding("b", "warn", "so so", "do x")]


@pytest.mark.parametrize(("failing", "status"), [(False, 0), (True, 1)])
def test_the_status_is_that_of_the_worst(
    monkeypatch: pytest.MonkeyPatch, failing: bool, status: int
) -> None:
    found = [*FINDINGS, *([Finding("c", "fail", "broken", "do y")] if failing else [])]
    monkeypatch.setattr(diagnosing, "findings", lambda folder, disk_speed: iter(found))
    human = CliRunner().invoke(main, ["doctor"])
    assert human.exit_code == status
    assert "fix: do x" in human.stdout
    assert human.stderr.strip() == (
        "1 to mend, 1 to look at." if failing else "Ready, 1 to look at."
    )
    machine = CliRunner().invoke(main, ["doctor", "--json"])
    assert machine.exit_code == status
    value = json.loads(machine.stdout)
    assert value["ok"] is not failing
    assert [check["name"] for check in value["checks"]] == [check.name for check in found]


def test_this_very_machine(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", "--json", "--folder", str(tmp_path)])
    value = json.loads(result.stdout)
    assert {"python", "cpu", "ram", "disk", "hub cache", "profiles"} <= {
        check["name"] for check in value["checks"]
    }
    assert all(check["fix"] for check in value["checks"] if check["status"] in ("warn", "fail"))
    assert result.exit_code == (0 if value["ok"] else 1)
