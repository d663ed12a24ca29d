"""The frontier: its arithmetic on small fixed results, its picture, llama.cpp's quantisers, arms of a tiny model."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_tiny, save_tokenizer
from llama import llama_python, needs_llama

from benchmarks import frontier
from benchmarks.frontier_plot import plot
from benchmarks.frontier_report import (
    LLAMA,
    OURS,
    at,
    beside,
    curve,
    key_of,
    lines,
    points_of,
    ratios_table,
)


def row(bits: float, rise: float, kl: float, part: str = "experts") -> dict[str, Any]:
    """An arm of a model of 8,000 expert weights and 2,000 others."""
    own = round(bits * 1000)
    return {
        "experts_bytes": own,
        "file_bytes": own + (4000 if part == "experts" else 2000),
        "loss_original": 3.0,
        "loss": 3.0 + rise,
        "kl": kl,
        "exact_match": {"words": {"items": 50, "right": 10}},
    }


def ledger(**arms: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "demo",
        "tokens": 512,
        "loss": 3.0,
        "weights": {"experts": 8000, "whole": 10000},
        "arms": {key.replace("__", "|"): value for key, value in arms.items()},
    }


def test_values_between_sizes_are_on_the_log_scale() -> None:
    best = curve([(2.0, 0.04), (4.0, 0.0025), (2.6, 0.05), (3.0, 0.04), (4.0, 0.003)])
    assert best == [
        (2.0, 0.04),
        (4.0, 0.0025),
    ]  # what a smaller one equals or beats is no better type
    assert at(best, 2.0) == pytest.approx(0.04) and at(best, 4.0) == pytest.approx(0.0025)
    assert at(best, 3.0) == pytest.approx(0.01)  # the geometric mean
    assert at(best, 1.9) is None and at(best, 4.1) is None and at([], 3.0) is None
    assert at([(2.0, 0.01), (4.0, -0.01)], 3.0) == pytest.approx(0.0)


def test_ours_are_held_against_the_better_type_of_the_same_seed() -> None:
    data = ledger(
        **{
            "experts__llama.cpp__Q2__0": row(2.0, 0.08, 0.04),
            "experts__llama.cpp__Q4__0": row(4.0, 0.004, 0.0025),
            "experts__llama.cpp__Q2__1": row(2.0, 0.08, 0.08),
            "experts__llama.cpp__Q4__1": row(4.0, 0.004, 0.005),
            "experts__llama.cpp__Q5__0": row(5.0, 0.001, 0.001),
            "experts__ours__--bits 3__0": row(3.0, 0.0179, 0.004),
            "experts__ours__--bits 3__1": row(3.0, 0.0179, 0.012),
            "experts__ours__--bits 4.5__0": row(4.5, 0.001, 0.0012),
            "experts__ours__--bits 1.5__0": row(1.5, 0.1, 0.1),
        }
    )
    pairs = beside(points_of(data), "experts")
    assert list(pairs) == ["--bits 4.5", "--bits 3", "--bits 1.5"]
    assert [one.kl_ratio for one in pairs["--bits 3"]] == pytest.approx([0.4, 0.6])
    assert [one.rise_ratio for one in pairs["--bits 3"]] == pytest.approx([1.0, 1.0], rel=1e-3)
    assert pairs["--bits 4.5"][0].rise_ratio is None  # below the noise: KL decides
    assert pairs["--bits 1.5"][0].kl_ratio is None
    _, rows = ratios_table(points_of(data), "experts")
    assert rows[0][4:6] == ("0.76", "0.76") and rows[0][8:] == ("KL decides", "at most 0.8: HOLDS")
    assert rows[1][1:6] == ("3.000", "0.00800", "0.01500", "0.50", "0.60")
    assert rows[1][-1] == "at most 0.5: MISSED" and rows[2][-1] == "no type of this size"


def test_the_report_has_every_arm_and_the_whole_file_by_its_own_size() -> None:
    data = ledger(
        **{
            "experts__llama.cpp__IQ3_S__0": row(3.44, 0.01, 0.01),
            "experts__ours__--bits 3__0": row(3.0, 0.005, 0.004),
            "whole__ours__--bits 3__0": row(3.0, 0.006, 0.005, "whole"),
        }
    )
    text = list(lines(data, markdown=False))
    first = next(line for line in text if "IQ3_S" in line).split()
    assert first[:6] == ["llama.cpp", "IQ3_S", "3.440", "0.00", "0.01", "+0.0100"]
    assert first[6:] == ["0.01000"] * 3 + ["20.0", "%", "1"]
    whole = text[text.index("The whole file: what is dense is in few bits as well.") :]
    own = next(line for line in whole if "--bits" in line).split()
    assert own[3] == "4.000"  # 5,000 bytes, 10,000 weights
    marked = "\n".join(lines(data, markdown=True))
    assert "| llama.cpp | IQ3_S | 3.440 |" in marked and "| `--bits 3` |" in marked


def test_the_picture_has_a_dot_for_every_arm_and_the_types_names() -> None:
    data = ledger(
        **{
            key_of("experts", LLAMA, f"Q{bits}", seed): row(bits, 0.1, 0.1 / bits**2 + seed / 1000)
            for bits in (2, 3, 4)
            for seed in (0, 1)
        },
        **{key_of("experts", OURS, "--bits 2", 0): row(2.0, 0.01, 0.01)},
    )
    space = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(plot(points_of(data), "a < b"))
    assert len(list(root.iter(f"{space}circle"))) == 4
    names = {one.text for one in root.iter(f"{space}text") if "name" in (one.get("class") or "")}
    assert names == {"Q2", "Q3", "Q4", "llama.cpp", "conmoe-edge"}
    assert ET.fromstring(plot([], "nothing")) is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("olmoe", tmp_path_factory.mktemp("models") / "model")
    save_tokenizer(folder)
    return folder


@needs_llama
def test_llamas_quantisers_there_and_back() -> None:
    from benchmarks.frontier_llama import round_trips

    python = llama_python()
    assert python is not None
    torch.manual_seed(0)
    weights = torch.randn(2, 16, 96)
    worth = np.ones((2, 96), np.float32)
    worth[:, :8] = 1e4
    errors = {}
    with round_trips(python) as trips:
        for kind, bits in (("Q8_0", 8.5), ("Q4_K", 4.5), ("Q2_K", 2.625), ("IQ2_XS", 2.3125)):
            back, said = trips(kind, weights, worth)
            assert said == bits and back.shape == weights.shape
            errors[kind] = (back - weights).square()
        even, _ = trips("Q2_K", weights, np.ones((2, 96), np.float32))
        with pytest.raises(RuntimeError, match="NO_SUCH_TYPE"):
            trips("NO_SUCH_TYPE", weights, None)
        assert trips("Q8_0", weights, None)[1] == 8.5  # the program goes on
    means = [float(error.mean()) for error in errors.values()]
    assert means == sorted(means) and means[0] < 1e-3 < means[-1] < 1.0
    # Columns that matter more are hit less.
    assert float(errors["Q2_K"][..., :8].mean()) < 0.7 * float(
        (even - weights)[..., :8].square().mean()
    )


def test_the_importance_matrix_is_the_mean_square_of_what_each_projection_gets(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from benchmarks.frontier_llama import importance_of, sizes_of
    from conmoe_edge.compress.stream.calibration_text import TokenSet

    ids = torch.arange(5, 45).view(2, 20) % 60
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 12:] = False
    found = importance_of(model, TokenSet(ids, mask, ("a", "b")))
    plain = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    experts = plain.model.layers[1].mlp.experts
    seen: list[tuple[torch.Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        for row, held in zip(ids, mask, strict=True):
            plain(input_ids=row[held][None], use_cache=False)
    hidden = torch.cat([h.reshape(-1, h.shape[-1]) for h, _ in seen])
    index = torch.cat([i for _, i in seen])
    for expert in range(experts.gate_up_proj.shape[0]):
        own = hidden[(index == expert).any(-1)]
        gate, up = (own @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        for name, rows in (("gate_up_proj", own), ("down_proj", inner)):
            wanted = rows.square().mean(0) if len(rows) else torch.ones(rows.shape[1])
            np.testing.assert_allclose(
                found[f"1.{name}"][expert], wanted.detach(), rtol=2e-2, atol=1e-6
            )
    assert sizes_of(model).all_weights == sum(p.numel() for p in plain.parameters())


@needs_llama
def test_arms_are_run_once_and_both_sides_measure_alike(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", str(model), "--seeds", "1", "--types", "Q8_0", "Q2_K", "--tokens", "512"]
    words += ["--fit", "--precision source --rate 0.25", "--calibration-tokens", "512"]
    words += ["--llama-python", str(llama_python()), "--work", str(tmp_path / "work")]
    words += ["--results", str(tmp_path / "results")]
    assert frontier.main(words) == 0
    data = json.loads((tmp_path / "results" / "frontier.json").read_text())
    fine, coarse = (data["arms"][f"experts|llama.cpp|{kind}|1"] for kind in ("Q8_0", "Q2_K"))
    own = data["arms"]["experts|ours|--precision source --rate 0.25|1"]
    assert fine["loss_original"] == coarse["loss_original"] == own["loss_original"] == data["loss"]
    assert 0 <= fine["kl"] < coarse["kl"]
    assert fine["experts_bytes"] == round(data["weights"]["experts"] * 8.5 / 8)
    assert fine.get("exact_match", {}).keys() == own["exact_match"].keys()
    capsys.readouterr()
    monkeypatch.setattr(frontier, "_our_arm", lambda *_: pytest.fail("run again"))
    monkeypatch.setattr("benchmarks.frontier_llama.hidden_of", lambda *_: pytest.fail("run again"))
    assert frontier.main(words) == 0
    assert "Q2_K" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give another --work"):
        frontier.main([*words, "--tokens", "256"])


def test_a_fit_that_fails_is_said_and_not_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model), "--seeds", "0", "--only", "ours", "--tokens", "128"]
    words += ["--fit", "--rate 0.25 --no-such-flag", "--work", str(tmp_path / "work")]
    assert frontier.main([*words, "--results", str(tmp_path / "results")]) == 1
    said = capsys.readouterr().err
    assert "no-such-flag" in said
    assert json.loads((tmp_path / "work" / "frontier.json").read_text())["arms"] == {}
