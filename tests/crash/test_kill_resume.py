"""A fit that is killed at any durable step goes on, loses at most one layer, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.fs.durable import CRASH_STATUS, CRASH_VARIABLE
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
from conmoe_edge.errors import DoesNotFit, OutputExists, ResumeMismatch
from conmoe_edge.memory.budget import Budget
from conmoe_edge.offload.simulate.machine_file import MACHINE_FILE
from conmoe_edge.plan.planner import make_plan
from conmoe_edge.plan.request import PlanRequest
from tests.patience import PATIENCE

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the test forks, so that torch is imported once"
)
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny("qwen3_moe", folder, mlp_only_layers=[])
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog 0123456789 " * 30
    )
    return folder


def fit(source: Path, out: Path, **more: Any) -> None:
    layers = []
    settings: dict[str, Any] = {
        "budget": "4GB",
        "device": "cpu",
        "rate": 0.5,
        "scope": 2,
        "calibration": source.parent / "text.txt",
        "calibration_tokens": 512,
        "progress": lambda step: (
            layers.append(step.step) if step.stage in ("calibrate", "receipt") else None
        ),
    }
    try:
        api.fit(str(source), out, **{**settings, **more})
    finally:
        _append(out.parent / f"{out.name}.layers", layers)


def _append(path: Path, layers: list[int]) -> None:
    with path.open("a") as file:
        file.writelines(f"{layer}\n" for layer in layers)


def child(
    run: Callable[[], None], crash_at: int | None = None
) -> multiprocessing.process.BaseProcess:
    def main() -> None:
        if crash_at is not None:
            os.environ[CRASH_VARIABLE] = str(crash_at)
        run()

    assert FORK is not None
    process = FORK.Process(target=main)
    process.start()
    return process


def finish(process: multiprocessing.process.BaseProcess) -> int:
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != MACHINE_FILE
    }


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def golden(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("golden") / "out"
    assert finish(child(lambda: fit(source, out))) == 0
    verify_package(out, deep=True)
    return digests(out)


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_durable_steps(
    stride: int, source: Path, golden: dict[str, str], tmp_path: Path
) -> None:
    """Every ``stride``-th of the steps (fsync, rename, delete), until a run ends before it comes to its step."""
    step = 1 - stride
    while True:
        step += stride
        out = tmp_path / str(step) / "out"
        status = finish(child(lambda out=out: fit(source, out), step))
        if status == 0:
            break
        assert status == CRASH_STATUS
        if out.exists():  # killed after the rename: then it is whole
            verify_package(out, deep=True)
            continue
        assert finish(child(lambda out=out: fit(source, out))) == 0
        assert digests(out) == golden, f"killed at step {step}"
        assert leftovers(out.parent) == []
    assert step > 5 * LAYERS, "the crash points were not reached"


@pytest.mark.parametrize("method", ["reap", "mone"])
def test_pruning_goes_on_too(method: str, source: Path, tmp_path: Path) -> None:
    """Closed slots and sums of outputs survive between the two layers of a scope, and after them."""
    whole = tmp_path / "whole"
    assert finish(child(lambda: fit(source, whole, method=method))) == 0
    for step in (24, 34, 46, 60):  # in the first layer, after it, after the scope, in the receipt
        out = tmp_path / str(step) / "out"
        run = lambda out=out: fit(source, out, method=method)  # noqa: E731
        assert finish(child(run, step)) == CRASH_STATUS
        assert finish(child(run)) == 0
        assert digests(out) == digests(whole), f"killed at step {step}"


def test_killed_at_random_times_loses_at_most_a_layer_each_time(
    source: Path, golden: dict[str, str], tmp_path: Path
) -> None:
    random_times = random.Random(7)
    out = tmp_path / "out"
    for _ in range(4):
        process = child(lambda: fit(source, out))
        time.sleep(random_times.uniform(0.05, 0.8))
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        finish(process)
        if out.exists():
            break
    if not out.exists():
        assert finish(child(lambda: fit(source, out))) == 0
    assert digests(out) == golden


def test_interrupted_run_repeats_one_layer_at_the_most(
    source: Path, golden: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C while the second layer is calibrated: the next run begins with that layer."""
    out = tmp_path / "out"

    def stop(step: Any) -> None:
        if step.stage == "calibrate" and step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(source, out, progress=stop)
    seen: list[tuple[str, int]] = []
    fit(source, out, progress=lambda step: seen.append((step.stage, step.step)))
    assert [step for stage, step in seen if stage == "calibrate"] == [2]
    assert digests(out) == golden


def test_changed_settings_are_refused_by_name(
    source: Path, golden: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def stop(step: Any) -> None:
        if step.stage == "calibrate" and step.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(source, out, progress=stop)
    other_text = tmp_path / "other.txt"
    other_text.write_text("quite another text " * 200)
    changes: dict[str, Any] = {
        "rate": 0.25,
        "scope": 1,
        "budget": "5GB",
        "calibration": other_text,
        "calibration_tokens": 1024,
        "seed": 3,
        "context": 64,
    }
    for name, value in changes.items():
        with pytest.raises(ResumeMismatch) as error:
            fit(source, out, **{name: value})
        assert name in error.value.why and "--fresh" in error.value.fix
        assert not out.exists()
    fit(source, out, fresh=True)
    assert digests(out) == golden


def test_existing_output_is_kept_or_replaced_whole(
    source: Path, golden: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fit(source, out, rate=0.25)
    before = digests(out)
    with pytest.raises(OutputExists):
        fit(source, out)
    assert digests(out) == before
    for step in (1, 20, 40, 50, 52, 54, 56, 58, 60):
        status = finish(child(lambda: fit(source, out, overwrite=True), step))
        assert status in (0, CRASH_STATUS)
        assert not out.exists() or digests(out) in (before, golden)
    fit(source, out, overwrite=True)
    assert digests(out) == golden
    assert leftovers(tmp_path) == []


def test_mixed_precision_killed_inside_a_scope_gives_the_same_bytes(tmp_path: Path) -> None:
    """Which prototypes get more bits is measured on hidden states of both layers of a scope, one of them run before."""
    source = tmp_path / "source"
    wide = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64, "head_dim": 16}
    save_tiny("qwen3_moe", source, mlp_only_layers=[], **wide)
    save_tokenizer(source)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    anatomy = api.plan(str(source), budget="4GB", device="cpu").anatomy
    levers: dict[str, Any] = {"rate": 0.5, "scope": 2, "precision": "int8+int4"}

    def mixed(nbytes: int) -> int:
        try:
            plan = make_plan(anatomy, Budget("cpu", nbytes, "", "test"), PlanRequest(**levers))
        except DoesNotFit:
            return 0
        return plan.chosen.wide_prototypes

    low, high = 0, 4 * 10**9  # the least budget with five wide records
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if mixed(middle) >= 5 else (middle + 1, high)
    levers["budget"] = f"{low}B"
    whole = tmp_path / "whole"
    assert finish(child(lambda: fit(source, whole, **levers))) == 0
    manifest = load_manifest(whole)
    kinds = [manifest.layouts[entry.layout].precision for entry in manifest.prototypes]
    assert kinds.count("int8") == 5 and kinds.count("int4") == 7
    golden = digests(whole)

    def stop(step: Any) -> None:
        if step.stage == "calibrate" and step.step == 1:  # the first layer of the scope is done
            os._exit(CRASH_STATUS)

    out = tmp_path / "out"
    assert finish(child(lambda: fit(source, out, progress=stop, **levers))) == CRASH_STATUS
    assert not out.exists()
    assert finish(child(lambda: fit(source, out, **levers))) == 0
    assert digests(out) == golden


def test_a_method_with_a_precision_of_its_own_resumes_too(source: Path, tmp_path: Path) -> None:
    """``mc-smoe`` keeps tokens and logits of a layer until it is decided; killed twice it ends with the same bytes."""
    settings: dict[str, Any] = {"method": "mc-smoe", "scope": 1}
    whole = tmp_path / "whole" / "out"
    assert finish(child(lambda: fit(source, whole, **settings))) == 0
    out = tmp_path / "killed" / "out"
    for step in (20, 9):
        assert finish(child(lambda: fit(source, out, **settings), step)) == CRASH_STATUS
        assert not out.exists()
    assert finish(child(lambda: fit(source, out, **settings))) == 0
    assert digests(out) == digests(whole)


@pytest.mark.parametrize("widths", ["free", "equal"])
def test_a_method_that_follows_the_package_resumes_too(
    widths: str, source: Path, tmp_path: Path
) -> None:
    """``auto`` keeps a third stream between layers, and bytes that a layer has left go to the next; killed at some
    durable steps it ends with the same bytes.
    """
    settings: dict[str, Any] = {"method": "auto", "scope": 1, "widths": widths}
    whole = tmp_path / "whole" / "out"
    assert finish(child(lambda: fit(source, whole, **settings))) == 0
    assert (len(load_manifest(whole).layouts) > 1) == (widths == "free")
    for step in (14, 26, 40):
        out = tmp_path / str(step) / "out"
        assert finish(child(lambda out=out: fit(source, out, **settings), step)) == CRASH_STATUS
        assert finish(child(lambda out=out: fit(source, out, **settings))) == 0
        assert digests(out) == digests(whole), f"killed at step {step}"
