"""``doctor``: each finding against a machine that is as described, and the command as a whole."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from conmoe_edge.cli.main import main
from conmoe_edge.cli.views import checks as _checks
from conmoe_edge.cli.views import checks_gpu as _checks_gpu
from conmoe_edge.cli.views.checks import Check
from conmoe_edge.cli.views.checks_gpu import Gpu
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
    assert _checks.python_check().status == "ok"
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=99"})
    check = _checks.python_check()
    assert check.status == "fail"
    assert ">=99" in check.fix


def test_packages_outside_the_tested_range_fail_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["torch>=2", "transformers>=99", "no-such-package>1", 'pytest>99; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: [*wanted, "click>=8"])
    found = {check.name: check for check in _checks.package_checks()}
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
    assert [check.status for check in _checks.package_checks()] == ["warn"]


def test_memory_names_the_limit_that_counts() -> None:
    assert _checks.memory_check(facts()).status == "ok"
    inside = facts(cgroup_limit=4 * GIB, cgroup_available=1 * GIB)
    check = _checks.memory_check(inside)
    assert check.status == "warn"
    assert "1.00 GiB free" in check.text
    assert "may use 4.00 GiB" in check.text


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conmoe_edge.memory.machine.disk_free", lambda folder: 1 * GIB)
    check = _checks.disk_check(tmp_path)
    assert check.status == "warn"
    assert "--out" in check.fix


def test_disk_speed_is_measured_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_checks, "_PROBE_BYTES", 4 << 20)
    check = _checks.disk_speed_check(tmp_path)
    assert "/s reading 4.0 MiB" in check.text
    assert not list(tmp_path.iterdir())
    assert _checks.disk_speed_check(tmp_path / "absent").status == "warn"


def test_a_broken_profile_is_found_with_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONMOE_CONFIG_DIR", str(tmp_path))
    assert _checks.config_check().status == "ok"
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.toml").write_text("memry = 3\n", encoding="utf-8")
    check = _checks.config_check()
    assert check.status == "fail"
    assert "mine.toml" in check.text
    assert check.fix


def test_an_operator_or_the_reason_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from conmoe_edge.offload.kernels.cpu import bindings as native
    from conmoe_edge.offload.kernels.triton import launch as gpu

    if native.operator() is not None:
        assert _checks.operator_check().status == "ok"
    for package, check in ((native, _checks.operator_check), (gpu, _checks.gpu_operator_check)):
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        for name in ("operator", "gpu_operator"):
            monkeypatch.setattr(package, name, lambda *_: None, raising=False)
        monkeypatch.setattr(package, "why_not", lambda *_: "no compiler\nand much more")
        found = check()
        assert found.status == "warn" and found.fix
        assert found.text.endswith("(no compiler)")


def gpu_findings(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], *, build: str | None, usable: bool
) -> list[Check]:
    torch = SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=build),
        cuda=SimpleNamespace(
            is_available=lambda: usable,
            get_device_capability=lambda index: (8, 9),
            get_arch_list=lambda: ["sm_80", "sm_90"],
            get_device_name=lambda index: "a GPU",
        ),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(_checks_gpu, "read_gpus", lambda: (gpus, "580.1"))
    return list(_checks_gpu.gpu_checks("no driver"))


CARD = Gpu("RTX 4090", 24 * GIB, 20 * GIB, (("Xorg", 812, GIB), ("python", 99, 3 * GIB)))


def test_without_a_gpu_the_cpu_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = gpu_findings(monkeypatch, [], build=None, usable=False)
    assert (check.status, check.fix) == ("info", "")
    assert "no driver" in check.text


def test_a_gpu_that_works_names_who_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, card = gpu_findings(monkeypatch, [CARD], build="12.8", usable=True)
    assert cuda.status == "ok"
    assert card.status == "ok"
    assert "Xorg (pid 812, 1.00 GiB)" in card.text
    full = Gpu("RTX 4090", 24 * GIB, 2 * GIB, ())
    assert gpu_findings(monkeypatch, [full], build="12.8", usable=True)[1].status == "warn"


def test_torch_without_cuda_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu_findings(monkeypatch, [CARD], build=None, usable=False)[0]
    assert check.status == "warn"
    assert "without CUDA" in check.text
    assert check.fix


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu_findings(monkeypatch, [CARD], build="13.0", usable=False)[0]
    assert check.status == "fail"
    assert "580.1" in check.text


FINDINGS = [Check("a", "ok", "fine"), Check("b", "warn", "so so", "do x")]


@pytest.mark.parametrize(("failing", "status"), [(False, 0), (True, 1)])
def test_the_status_is_that_of_the_worst(
    monkeypatch: pytest.MonkeyPatch, failing: bool, status: int
) -> None:
    found = [*FINDINGS, *([Check("c", "fail", "broken", "do y")] if failing else [])]
    monkeypatch.setattr(_checks, "all_checks", lambda folder, disk_speed: iter(found))
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
