"""What ``doctor`` finds on a machine that is as described."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import conmoe_edge
from conmoe_edge.api import diagnosing
from conmoe_edge.memory.machine import MachineFacts
from conmoe_edge.units import GIB


def facts(**changes: Any) -> MachineFacts:
    fields: dict[str, Any] = {
        "ram_total": 32 * GIB,
        "ram_available": 20 * GIB,
        "cgroup_limit": None,
        "cgroup_available": None,
        "physical_cores": 8,
        "gpu": None,
        "gpu_problem": "no driver",
        "disk_free": 100 * GIB,
    }
    return MachineFacts(**{**fields, **changes})


def test_python_is_compared_with_what_the_package_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=3.11"})
    assert diagnosing.python_finding().status == "ok"
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=99"})
    check = diagnosing.python_finding()
    assert check.status == "fail"
    assert ">=99" in check.fix


def test_packages_outside_the_tested_range_fail_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["torch>=2", "transformers>=99", "no-such-package>1", 'pytest>99; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: [*wanted, "click>=8"])
    found = {check.name: check for check in diagnosing.package_findings()}
    assert found["torch"].status == "ok"
    assert found["transformers"].status == "fail"
    assert found["transformers"].fix == 'pip install "transformers>=99"'
    assert found["no-such-package"].text == "not installed"
    assert found["packages"].text.startswith("1 more")
    assert "pytest" not in found


def test_a_checkout_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert [check.status for check in diagnosing.package_findings()] == ["warn"]


def test_memory_names_the_limit_that_counts() -> None:
    assert diagnosing.memory_finding(facts()).status == "ok"
    inside = facts(cgroup_limit=4 * GIB, cgroup_available=1 * GIB)
    check = diagnosing.memory_finding(inside)
    assert check.status == "warn"
    assert "1.00 GiB free" in check.text
    assert "may use 4.00 GiB" in check.text


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conmoe_edge.memory.machine.disk_free", lambda folder: 1 * GIB)
    check = diagnosing.disk_finding(tmp_path)
    assert check.status == "warn"
    assert "--out" in check.fix


def test_disk_speed_is_measured_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosing, "_PROBE_BYTES", 4 << 20)
    check = diagnosing.disk_speed_finding(tmp_path)
    assert "/s reading 4.0 MiB" in check.text
    assert not list(tmp_path.iterdir())
    assert diagnosing.disk_speed_finding(tmp_path / "absent").status == "warn"


def test_a_broken_profile_is_found_with_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONMOE_CONFIG_DIR", str(tmp_path))
    assert diagnosing.config_finding().status == "ok"
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.toml").write_text("memry = 3\n", encoding="utf-8")
    check = diagnosing.config_finding()
    assert check.status == "fail"
    assert "mine.toml" in check.text
    assert check.fix


def test_an_operator_or_the_reason_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from conmoe_edge.offload.kernels.cpu import bindings as native
    from conmoe_edge.offload.kernels.triton import launch as gpu

    if native.operator() is not None:
        assert diagnosing.operator_finding().status == "ok"
    for package, check in (
        (native, diagnosing.operator_finding),
        (gpu, diagnosing.gpu_operator_finding),
    ):
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        for name in ("operator", "operator_library", "gpu_operator"):
            monkeypatch.setattr(package, name, lambda *_: None, raising=False)
        monkeypatch.setattr(package, "why_not", lambda *_: "no compiler\nand much more")
        found = check()
        assert found.status == "warn" and found.fix
        assert found.text.endswith("(no compiler)")


def test_the_way_of_single_tokens_is_said_where_it_is_known() -> None:
    def loaded(**known: Any) -> Any:
        return SimpleNamespace(conmoe=SimpleNamespace(**known))

    assert list(diagnosing.fast_path_findings(loaded(fast_path=None))) == []
    live = loaded(fast_path=SimpleNamespace(summary="3 of 3 layers"))
    (found,) = diagnosing.fast_path_findings(live)
    assert (found.status, found.text) == ("info", "3 of 3 layers")


def test_from_python(tmp_path: Path) -> None:
    found = {one.name: one for one in conmoe_edge.doctor(tmp_path)}
    assert {"python", "cpu", "ram", "disk", "profiles"} <= set(found)
    assert all(one.fix for one in found.values() if one.status in ("warn", "fail"))


def test_a_class_that_changed_is_named_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from conmoe_edge.offload.fastpath import supported

    found = diagnosing.listed_finding()
    assert found.status == "ok" and f"of {len(supported.LISTED) - 1} classes" in found.text
    piece, _ = supported.LISTED["olmoe.OlmoeAttention"]
    monkeypatch.setitem(supported.LISTED, "olmoe.OlmoeAttention", (piece, ("0" * 16,)))
    found = diagnosing.listed_finding()
    assert found.status == "warn" and "olmoe.OlmoeAttention" in found.text
    assert found.fix.startswith("pip install 'transformers")
