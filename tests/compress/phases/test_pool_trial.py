"""Whether layers share prototypes, where nobody said: it is measured, and the package is as if it had been said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from free_fits import check_same_bytes, fit, prepare

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.package.manifest_io import verify_package
from conmoe_edge.compress.phases import pool_trial as trial_module
from conmoe_edge.compress.phases.originals import Originals

LEVERS: dict[str, Any] = {"rate": 0.5, "method": "energy", "precision": "source"}
TRIAL = "conmoe_edge.compress.pipeline.pool_trial"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of experts, a dense one between them, and one that has nobody to share with."""
    sizes = {"num_hidden_layers": 4, "mlp_only_layers": [1]}
    return prepare("qwen3_moe", tmp_path_factory.mktemp("qwen"), **sizes)


@pytest.fixture(scope="module")
def forced(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Manifest]:
    folder = tmp_path_factory.mktemp("forced")
    return {scope: fit(source, folder / str(scope), scope=scope, **LEVERS) for scope in (1, 2)}


def of_package(manifest: Manifest) -> dict[str, Any]:
    """What a package is, its plan and notes apart."""
    files = {name: one for name, one in manifest.files.items() if name.endswith(".safetensors")}
    return {"files": files, "slots": manifest.slots, "receipt": manifest.receipt}


@pytest.mark.parametrize(("measured", "taken"), [({1: 0.2, 2: 0.1}, 2), ({1: 0.1, 2: 0.1}, 1)])
def test_the_package_is_that_of_the_scope_that_measured_best(
    source: Path,
    forced: Mapping[int, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: dict[int, float],
    taken: int,
) -> None:
    monkeypatch.setattr(TRIAL, lambda run, model, tried: measured)
    report = api.fit(
        str(source),
        tmp_path / "out",
        budget="4GB",
        device="cpu",
        calibration=source.parent / "text.txt",
        calibration_tokens=1024,
        **LEVERS,
    )
    manifest = verify_package(tmp_path / "out", deep=True)
    assert of_package(manifest) == of_package(forced[taken])
    assert manifest.scope == manifest.plan["chosen"]["scope"] == taken
    assert report.plan.plan.chosen.scope == taken and report.plan.scopes_tried == (1, 2)
    (note,) = (one for one in report.notes if "pools of 2 layers" in one)
    assert note in manifest.notes and note.startswith(f"Scope {taken} ")


@pytest.mark.parametrize("method", ["energy", "conmoe", "mone", "reap+drop"])
def test_what_is_measured_is_what_a_scope_does(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With every expert kept it is nothing; with half of them it is what the package's map does to the output, so that
    the fewer stay, the more it is.
    """
    found: dict[float, dict[int, float]] = {}
    counted, inner = trial_module.kept, trial_module.pool_trial

    def trial(run: Any, model: Any, tried: Any) -> dict[int, float]:
        for rate in (0.0, 0.25, 0.5):
            monkeypatch.setattr(
                trial_module, "kept", lambda pool, _, rate=rate: counted(pool, rate)
            )
            found[rate] = inner(run, model, tried)
        again = inner(run, model, tried)
        assert again == found[0.5], "the same once more, bit for bit"
        assert not any(run.work.experts(layer).exists() for layer in run.sizes.moe_layers)
        return again

    monkeypatch.setattr(TRIAL, trial)
    fit(source, tmp_path / "out", **{**LEVERS, "method": method})
    for scope in (1, 2):
        assert found[0.0][scope] < 1e-6 < found[0.25][scope] < found[0.5][scope]


@pytest.mark.parametrize("method", ["energy", "conmoe", "mone"])
def test_on_the_texts_of_a_fit_it_measures_what_the_receipts_of_both_scopes_say(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Decided on all of the calibration text and measured on what is held out."""
    inner, found = trial_module.pool_trial, {}
    levers = {**LEVERS, "method": method}

    def originals(run: Any, model: Any, _: int, after: int, others: int = 0) -> Originals:
        tokens = run.job.held_out if after else run.job.train
        job = replace(run.job, train=tokens)
        return Originals(replace(run, job=job), model, len(tokens.domains), 0, others)

    def trial(run: Any, model: Any, tried: Any) -> dict[int, float]:
        found.update(inner(run, model, tried))
        return found

    monkeypatch.setattr(TRIAL, trial)
    monkeypatch.setattr(trial_module, "Originals", originals)
    fit(source, tmp_path / "measured", **levers)
    for scope in (1, 2):
        forced = fit(source, tmp_path / str(scope), scope=scope, **levers)
        assert found[scope] == pytest.approx(forced.receipt["kl"], rel=1e-3)


def test_a_stopped_trial_begins_anew_and_comes_to_the_same(source: Path, tmp_path: Path) -> None:
    whole = fit(source, tmp_path / "whole", **LEVERS)

    def stop_at(stage: str, layer: int) -> Callable[[Any], None]:
        def stop(step: Any) -> None:
            if (step.stage, step.step) == (stage, layer):
                raise KeyboardInterrupt

        return stop

    stages: list[str] = []
    for place in (("scope", 2), ("calibrate", 1)):
        with pytest.raises(KeyboardInterrupt):
            fit(source, tmp_path / "out", progress=stop_at(*place), **LEVERS)
    fit(source, tmp_path / "out", progress=lambda step: stages.append(step.stage), **LEVERS)
    assert "scope" not in stages, "what was measured is not measured again"
    check_same_bytes(tmp_path / "whole", tmp_path / "out")
    assert whole.scope in (1, 2)


def test_one_pass_measures_nothing_and_says_so(source: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    manifest = fit(
        source,
        tmp_path / "out",
        passes=1,
        progress=lambda step: stages.append(step.stage),
        **LEVERS,
    )
    assert "scope" not in stages and manifest.scope == 1
    assert any("--passes 2" in note for note in manifest.notes)


def test_methods_that_make_weights_keep_the_scope_of_the_plan(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(*_: Any) -> Any:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(TRIAL, trial)
    manifest = fit(source, tmp_path / "out", **{**LEVERS, "method": "hc-smoe"})
    assert manifest.scope == 1 and not any("pools" in note for note in manifest.notes)
