"""A model without a tokenizer: plan says so, fit refuses it, and ``no_tokenizer`` writes a package that says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import conmoe_edge
from conmoe_edge.api.running import open_session
from conmoe_edge.cli.main import main
from conmoe_edge.errors import CalibrationError
from conmoe_edge.model.tokenizers import load_tokenizer
from tests.families import tiny_model

_BUDGET = {"budget": "900MB", "device": "cpu"}
MISSING = "no tokenizer that can be used"


@pytest.fixture(scope="module", params=["olmoe", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of OLMoE's, transformers makes an empty tokenizer out of nothing; of Mixtral's it does not."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(request.param, max_position_embeddings=256).save_pretrained(folder)
    return folder


def test_plan_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = conmoe_edge.plan(str(model), **_BUDGET)
    assert report.tokenizer is False and report.to_json()["tokenizer"] is False
    with pytest.raises(SystemExit):
        main(["plan", str(model), "--gpu", "900MB", "--device", "cpu"])
    assert MISSING in capsys.readouterr().out
    assert conmoe_edge.plan("demo", **_BUDGET).tokenizer is True


@pytest.mark.parametrize("name", ["tokenizer.model", "hunyuan.tiktoken", "tokenizer.json"])
def test_a_vocabulary_that_does_not_open_is_no_tokenizer(
    model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / name).write_bytes(b"no vocabulary")
    with pytest.raises(CalibrationError, match=MISSING) as later:
        load_tokenizer(folder)
    report = conmoe_edge.plan(str(folder), **_BUDGET)
    assert (report.tokenizer, report.tokenizer_fault) == (False, later.value.why)
    with pytest.raises(SystemExit):
        main(["plan", str(folder), "--gpu", "900MB", "--device", "cpu"])
    assert MISSING in capsys.readouterr().out
    with pytest.raises(CalibrationError, match=MISSING):
        conmoe_edge.fit(str(folder), tmp_path / "out", **_BUDGET)


def test_fit_refuses_it_unless_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=MISSING) as caught:
        conmoe_edge.fit(str(model), tmp_path / "out", **_BUDGET)
    assert "--no-tokenizer" in caught.value.fix
    assert list(tmp_path.iterdir()) == []
    made = conmoe_edge.fit(str(model), tmp_path / "out", **_BUDGET, no_tokenizer=True)
    assert made.plan.plan.unchanged and "no tokenizer" in made.notes[0]
    with pytest.raises(CalibrationError, match=MISSING) as caught:
        open_session(tmp_path / "out")
    assert "tokenizer.json" in caught.value.fix


def test_no_tokenizer_is_no_way_to_calibrate(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=MISSING) as caught:
        conmoe_edge.fit(str(model), tmp_path / "out", **_BUDGET, rate=0.5, no_tokenizer=True)
    assert "calibration text" in caught.value.why and "--no-tokenizer" not in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_one_needs_no_flag(tmp_path: Path) -> None:
    made = conmoe_edge.fit("demo", tmp_path / "out", budget="900MB", device="cpu")
    assert made.plan.plan.unchanged and made.notes == ()
