"""The survey: which division of the prototypes is taken, and that no layer stays in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.compress.methods.stand_ins import NarrowedLayer, StandInLayer
from conmoe_edge.compress.phases import survey as survey_module
from conmoe_edge.compress.stream.expert_hooks import MappedTap
from conmoe_edge.model.streaming import StreamedModel


def test_the_survey_is_linear_in_the_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer runs the same number of times, however many layers there are."""
    runs: dict[int, int] = {}
    inner, rows = StreamedModel.run_layer, []

    def run_layer(self: StreamedModel, index: int, hidden: Any, batch: Any) -> Any:
        rows.append((index, len(hidden)))
        return inner(self, index, hidden, batch)

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)

    def survey(run: Any, model: Any) -> Any:
        rows.clear()
        found = surveyed(run, model)
        counts = {sum(n for at, n in rows if at == layer) for layer in range(run.layers)}
        assert len(counts) == 1
        runs[run.layers] = counts.pop()
        return found

    surveyed = survey_module.survey
    monkeypatch.setattr(StreamedModel, "run_layer", run_layer)
    monkeypatch.setattr("conmoe_edge.compress.pipeline.survey", survey)
    monkeypatch.setattr(survey_module, "share_out", lambda layers, each: [each] * len(layers))
    for layers in (2, 5):
        source = save_tiny("olmoe", tmp_path / str(layers), num_hidden_layers=layers)
        save_tokenizer(source)
        levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5}
        out = tmp_path / f"out-{layers}"
        api.fit(str(source), out, calibration=text, calibration_tokens=512, **levers)
    assert runs[2] == runs[5] > 0


@pytest.mark.parametrize(("best", "widths"), [(0, "free"), (1, "free"), (2, "free"), (1, "equal")])
def test_the_division_that_does_best_on_other_text_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int, widths: str
) -> None:
    seen: list[Any] = []

    def trial(run: Any, model: Any, found: Any, divisions: Any) -> list[float]:
        seen.extend(divisions)
        return [0.0 if number == best else 1.0 for number in range(len(divisions))]

    monkeypatch.setattr(survey_module, "share_out", lambda layers, each: [each - 2, each, each + 2])
    monkeypatch.setattr(survey_module, "_trial", trial)
    source = save_tiny("qwen3_moe", tmp_path / "source", mlp_only_layers=[])
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5, "widths": widths}
    api.fit(str(source), tmp_path / "out", calibration=text, calibration_tokens=512, **levers)
    manifest = load_manifest(tmp_path / "out")
    layers = sorted({one.id.layer for one in manifest.prototypes})
    assert seen[0] == dict.fromkeys(layers, seen[0][layers[0]]) and len(seen) == 3
    given = taken = 0
    for layer in layers:
        records = [
            manifest.layouts[one.layout].nbytes
            for one in manifest.prototypes
            if one.id.layer == layer
        ]
        if widths == "equal":
            assert len(records) == seen[best][layer]
            continue
        given += seen[best][layer] * 6144 // 4
        taken += sum(records)
        assert 0 <= given - taken < 1536, "what a layer leaves goes to the next"


def test_the_trial_measures_what_the_divisions_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all neurons kept the output is the original's; the more goes, the farther it is."""
    found: list[list[float]] = []
    inner = survey_module._trial

    def trial(run: Any, model: Any, errors: Any, divisions: Any) -> list[float]:
        counts = [{layer: units for layer in divisions[0]} for units in (8 * 4, 4 * 4, 1 * 4)]
        found.append(inner(run, model, errors, counts))
        return inner(run, model, errors, divisions)

    monkeypatch.setattr(survey_module, "share_out", lambda layers, each: [each - 1, each, each + 1])
    monkeypatch.setattr(survey_module, "_trial", trial)
    source = save_tiny("qwen3_moe", tmp_path / "source", mlp_only_layers=[])
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5}
    api.fit(str(source), tmp_path / "out", calibration=text, calibration_tokens=512, **levers)
    ((whole, half, one),) = found
    assert whole < 1e-6 < half < one


def test_no_layer_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer has been left, in the survey or after it, no tap holds on to its experts, and nothing to stand-ins.
    Of those there are never more than one division has.
    """
    holding: list[bool] = []
    standing: list[bool] = []
    leave, tap = StreamedModel.layer, StandInLayer.tap

    def one_division(self: StandInLayer, narrowed: NarrowedLayer, units: int) -> MappedTap:
        made = tap(self, narrowed, units)
        chosen = narrowed.chosen(units)
        standing.append(len(self._made) == sum(place > 0 for place, _ in chosen))
        return made

    @contextmanager
    def layer(self: StreamedModel, index: int, *, with_experts: bool = True) -> Iterator[Any]:
        with leave(self, index, with_experts=with_experts) as module:
            yield module
        taps = [getattr(experts, "_conmoe_tap", None) for _, experts in self.experts.values()]
        holding.append(any(isinstance(tap, MappedTap) for tap in taps))
        holding.append(any(type(one) is StandInLayer for one in gc.get_objects()))

    monkeypatch.setattr(StreamedModel, "layer", layer)
    monkeypatch.setattr(StandInLayer, "tap", one_division)
    monkeypatch.setattr(
        survey_module, "share_out", lambda layers, each: [each - 2, each + 2][: len(layers)]
    )
    source = save_tiny("afmoe", tmp_path / "source")  # a norm comes after its experts
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 40)
    levers: dict[str, Any] = {"budget": "4GB", "device": "cpu", "rate": 0.5, "method": "auto"}
    api.fit(str(source), tmp_path / "out", calibration=text, calibration_tokens=512, **levers)
    assert holding and not any(holding)
    assert len(standing) > 3 and all(standing)
