"""What a plan says of the export that its package allows: it is what the export then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.plan.request import PlanRequest

TEXT = "the quick brown fox jumps over the lazy dog " * 40
NO_CONSTANTS = "router slots add constants"
AS_LARGE = "as large as the model"


def source(family: str, folder: Path, **settings: Any) -> Path:
    path = save_tiny(family, folder / "source", **settings)
    save_tokenizer(path)
    return path


def note(path: Path, **levers: Any) -> str:
    request = PlanRequest(**{"budget": "4GB", "device": "cpu", "rate": 0.5, **levers})
    return api.plan(str(path), request).export_note


def fitted(path: Path, out: Path, **levers: Any) -> Any:
    (out.parent / "text.txt").write_text(TEXT)
    levers = {"budget": "4GB", "device": "cpu", "rate": 0.5, **levers}
    return api.fit(
        str(path), out, calibration=out.parent / "text.txt", calibration_tokens=512, **levers
    )


@pytest.mark.parametrize(
    ("levers", "said", "kind"),
    [
        ({}, NO_CONSTANTS, None),
        ({"method": "mone"}, NO_CONSTANTS, None),
        ({"method": "conmoe"}, AS_LARGE, "materialised"),
        ({"method": "reap"}, "", "pruned"),
        ({"engine": "hf"}, "", "materialised"),
    ],
    ids=["auto", "mone", "conmoe", "reap", "for-hf"],
)
def test_the_export_does_what_the_plan_said(
    levers: dict[str, Any], said: str, kind: str | None, tmp_path: Path
) -> None:
    path = source("olmoe", tmp_path, intermediate_size=64)
    planned = note(path, **levers)
    assert said in planned and bool(said) == bool(planned)
    report = fitted(path, tmp_path / "out", **levers)
    assert report.plan.export_note == planned
    if kind is None:
        with pytest.raises(UnsupportedModel, match="add a constant") as refused:
            api.export(tmp_path / "out", tmp_path / "plain")
        assert "--for hf" in refused.value.fix
        assert not (tmp_path / "plain").exists()
        return
    done = api.export(tmp_path / "out", tmp_path / "plain")
    assert done.kind == kind
    assert any("Saves no memory" in one for one in done.notes) == (said == AS_LARGE)


def test_experts_with_a_bias_hold_constants(tmp_path: Path) -> None:
    path = source("gpt_oss", tmp_path)
    assert NO_CONSTANTS not in note(path)
    fitted(path, tmp_path / "out")
    assert api.export(tmp_path / "out", tmp_path / "plain").kind == "materialised"


def test_an_unchanged_model_needs_no_word(tmp_path: Path) -> None:
    assert note(source("olmoe", tmp_path), rate="auto") == ""


def test_what_no_gguf_can_say_is_refused_before_the_fit(tmp_path: Path) -> None:
    path = source("mixtral", tmp_path, intermediate_size=64)
    with pytest.raises(UnsupportedModel, match="is not written as GGUF") as refused:
        note(path, engine="gguf")
    assert "--for hf" in refused.value.fix
    with pytest.raises(UnsupportedModel, match="is not written as GGUF"):
        fitted(path, tmp_path / "out", engine="gguf")
    assert not (tmp_path / "out").exists()
    assert note(path, engine="hf") == ""


def test_a_width_that_no_field_gives_is_said(tmp_path: Path) -> None:
    """Of DeepSeek V3's tiny model the shared experts follow the same field."""
    path = source("deepseek_v3", tmp_path, moe_intermediate_size=64)
    said = note(path, engine="hf")
    assert "saves no memory" in said and "32 of them zero" in said
    fitted(path, tmp_path / "out", engine="hf")
    done = api.export(tmp_path / "out", tmp_path / "plain")
    assert done.width == 64 and any("of them zero" in one for one in done.notes)


def test_nobody_is_sent_after_a_library_for_a_package_that_cannot_be_exported(
    tmp_path: Path,
) -> None:
    path = source("olmoe", tmp_path, intermediate_size=64)
    fitted(path, tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="add a constant"):
        api.export(
            tmp_path / "out",
            tmp_path / "o.gguf",
            form="gguf",
            quantise="Q8_0",
            llama_python=tmp_path / "no-such-python",
        )
