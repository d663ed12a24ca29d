"""The same fit gives the same bytes: on a faster disk, in another year, with less memory free, after other fits, and
when it was killed in between. What was measured of the machine is in ``machine.json`` alone.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from budgets import least_budget
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.fs.durable import CRASH_STATUS, CRASH_VARIABLE
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.memory.bandwidth import Meter
from conmoe_edge.memory.outcomes import recall
from conmoe_edge.offload.simulate import prefetch_search
from conmoe_edge.offload.simulate.machine_file import MACHINE_FILE, with_machine_file
from tests.patience import PATIENCE

LEVERS: dict[str, Any] = {"rate": 0.25, "precision": "source", "min_resident": 0.5}


@dataclass(frozen=True)
class Machine:
    """What a fit could see of the machine and of the hour."""

    memory: float | None
    disk: float | None
    free: int
    years: float


SLOW = Machine(4e9, 2e7, 3 << 30, 0.0)
FAST = Machine(90e9, 7e9, 1 << 28, 10.0)
UNKNOWN = Machine(None, None, 1 << 40, -1.0)


def pretend(machine: Machine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Meter, "memory", lambda self: machine.memory)
    patch.setattr(Meter, "disk", lambda self: machine.disk)
    real, now = psutil.virtual_memory, time.time
    patch.setattr(psutil, "virtual_memory", lambda: real()._replace(available=machine.free))
    patch.setattr(time, "time", lambda: now() + machine.years * 365.25 * 86400)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    save_tiny("qwen3_moe", folder, mlp_only_layers=[])
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog 012 " * 30)
    return folder


@pytest.fixture(scope="module")
def half(source: Path) -> str:
    """The least budget with slots for half of the prototypes, so that a predictor is fitted and reading ahead tried."""
    return least_budget(source, 9, **LEVERS)


def fit(source: Path, out: Path, **levers: Any) -> None:
    api.fit(
        str(source),
        out,
        device="cpu",
        calibration=source.parent / "text.txt",
        calibration_tokens=512,
        **levers,
    )


def digests(folder: Path) -> dict[str, str]:
    """Of everything but what was measured."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != MACHINE_FILE
    }


def in_a_child(run: Callable[[], None], crash_at: int | None = None) -> int:
    def main() -> None:
        if crash_at is not None:
            os.environ[CRASH_VARIABLE] = str(crash_at)
        run()

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize(
    "levers",
    [
        {"method": "conmoe"},
        {"method": "auto"},
        {"method": "reap"},
        {"method": "auto", "precision": "int8"},
        {"method": "mergemoe", "widths": "equal"},
        {"rate": "auto", "budget": "4GB"},
    ],
    ids=lambda levers: "-".join(map(str, levers.values())),
)
def test_whatever_the_machine_was_doing(
    levers: dict[str, Any],
    source: Path,
    half: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**LEVERS, "budget": half, **levers}
    found, measured = [], []
    for number, machine in enumerate((SLOW, FAST, UNKNOWN)):
        out = tmp_path / f"folder {number}" / ("out" * (number + 1))
        out.parent.mkdir()
        with monkeypatch.context() as patch:
            pretend(machine, patch)
            # Whatever reading ahead is worth at these rates, it is taken: the decision then differs where any could.
            patch.setattr(prefetch_search, "LEAST_GAIN", -10.0)
            patch.chdir(out.parent)
            patch.setenv("CONMOE_CACHE_DIR", str(tmp_path / f"cache {number}"))
            fit(source, out, **settings)
        verify_package(out, deep=True)
        found.append(digests(out))
        measured.append((out / MACHINE_FILE).read_text())
        manifest = load_manifest(out)
        budget = with_machine_file(out, manifest).plan["budget"]
        assert budget["device_bandwidth"] == machine.memory
        assert manifest.plan["budget"]["device_bandwidth"] is None
        if manifest.prefetch is not None:
            tuned = with_machine_file(out, manifest).prefetch
            assert tuned is not None and manifest.prefetch.depth == 0
            assert (tuned.depth > 0) == (machine.disk is not None)
    assert found[0] == found[1] == found[2]
    assert len(set(measured)) == 3


def test_a_profile_has_its_own_figures_and_nothing_is_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, machine in (("a", SLOW), ("b", FAST)):
        with monkeypatch.context() as patch:
            pretend(machine, patch)
            fit(source, tmp_path / name, budget="cpu-16gb", rate=0.5)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not (tmp_path / "a" / MACHINE_FILE).exists()
    assert load_manifest(tmp_path / "a").plan["budget"]["device_bandwidth"] > 0


def test_after_other_fits_were_remembered(source: Path, half: str, tmp_path: Path) -> None:
    settings = {**LEVERS, "budget": half}
    fit(source, tmp_path / "first", **settings)
    fit(source, tmp_path / "other", **{**settings, "precision": "int8"})
    model = load_manifest(tmp_path / "first").source["fingerprint"]["id"]
    assert len(recall(model)) >= 2
    fit(source, tmp_path / "second", **settings)
    assert digests(tmp_path / "second") == digests(tmp_path / "first")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
@pytest.mark.parametrize("step", [3, 12, 20, 28, 36, 44, 52, 58, 60, 62])
def test_killed_on_a_slow_machine_and_finished_on_a_fast_one(
    step: int, source: Path, half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**LEVERS, "budget": half, "method": "auto"}
    whole, out = tmp_path / "whole", tmp_path / "killed"

    def on(machine: Machine, target: Path) -> Callable[[], None]:
        def run() -> None:
            pretend(machine, monkeypatch)
            fit(source, target, **settings)

        return run

    assert in_a_child(on(UNKNOWN, whole)) == 0
    status = in_a_child(on(SLOW, out), step)
    assert status in (0, CRASH_STATUS)
    if not out.exists():
        assert in_a_child(on(FAST, out)) == 0
    assert digests(out) == digests(whole)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["560MB", "562MB", "2GiB"])
def test_the_demo(budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, machine in (("a", SLOW), ("b", FAST)):
        with monkeypatch.context() as patch:
            pretend(machine, patch)
            api.fit("demo", tmp_path / name, device="cpu", budget=budget, offline=True)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
