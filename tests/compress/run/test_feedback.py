"""Which fits are rounded with error feedback, and what calibration keeps for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.compress.pipeline import Consolidation
from conmoe_edge.compress.run.state import Run

FORMS = {
    "source": False,
    "bf16": False,
    "int8": True,
    "int4": True,
    "q4": True,
    "q3": True,
    "q2": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny("qwen3_moe", folder, hidden_size=64, moe_intermediate_size=64, mlp_only_layers=[])
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    return folder


class Seen(Exception):
    """The run is not wanted."""


@pytest.fixture
def run_of(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run_of(**levers: Any) -> Run:
        found: list[Run] = []

        def stop(self: Consolidation) -> None:
            found.append(self.state)
            raise Seen

        monkeypatch.setattr(Consolidation, "run", stop)
        text = source.parent / "text.txt"
        with pytest.raises(Seen):
            api.fit(
                str(source),
                tmp_path / "out",
                budget="4GB",
                device="cpu",
                calibration=text,
                calibration_tokens=512,
                fresh=True,
                **levers,
            )
        return found[0]

    return run_of


@pytest.mark.parametrize("precision", sorted(FORMS))
@pytest.mark.parametrize("method", ["conmoe", "auto"])
def test_every_quantised_form_and_no_other(run_of: Any, method: str, precision: str) -> None:
    run = run_of(method=method, precision=precision, rate=0.25)
    assert run.needs.inputs == FORMS[precision]
    assert run.has_package_stream == (FORMS[precision] or method == "auto")
    assert run.needs.tokens == run.method.needs.tokens


def test_layers_that_share_prototypes_have_no_stream_of_the_package(run_of: Any) -> None:
    run = run_of(method="conmoe", precision="q3", rate=0.25, scope=2)
    assert run.needs.inputs and not run.has_package_stream
