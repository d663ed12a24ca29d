"""Evaluation: figures against plain transformers, the receipt's own numbers, continuations, sources."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny, save_tokenizer

import conmoe_edge
from conmoe_edge.checkpoint.sources.origin import differs
from conmoe_edge.compress.quality.continuation import (
    common_start,
    continue_greedily,
    cut,
    repetition,
)
from conmoe_edge.compress.stream.streamed_model import open_subject
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.errors import CalibrationError, CheckpointError, ModelNotFound, UsageError

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "tokens": 160,
    "sequence_length": 32,
    "continuations": 3,
    "prompt_tokens": 8,
    "continuation_tokens": 6,
    "device": "cpu",
    "offline": True,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    one = "The lighthouse stood on a rock in the sea, and nobody knew who lit it. " * 12
    two = "if x > 3: return [y for y in range(x)] else: raise ValueError(x) " * 12
    path.write_text(f"<|document domain=prose|>\n{one}\n<|document domain=code|>\n{two}\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("olmoe", tmp_path_factory.mktemp("models") / "tiny")
    save_tokenizer(folder)
    return folder


def fitted(model: Path, text: Path, out: Path, **levers: Any) -> Path:
    conmoe_edge.fit(
        str(model),
        out,
        budget="2GiB",
        device="cpu",
        precision="source",
        calibration=text,
        calibration_tokens=512,
        offline=True,
        **levers,
    )
    return out


@pytest.fixture(scope="module")
def package(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(model, text, tmp_path_factory.mktemp("packages") / "half", rate=0.5)


def losses(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token that counts, by the plain model."""
    with torch.no_grad():
        rows = zip(ids, mask.long(), strict=True)  # one by one: a package has room for its context
    logits = torch.cat(
        [
            model(input_ids=row[None], attention_mask=held[None], use_cache=False).logits
            for row, held in rows
        ]
    )
    valid = mask[:, 1:] & mask[:, :-1]
    found = torch.log_softmax(logits[:, :-1].double(), -1)
    return -found.gather(-1, ids[:, 1:, None])[..., 0][valid]


def test_figures_are_those_of_plain_transformers(model: Path, package: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from conmoe_edge.compress.stream.calibration_text import evaluation_set, read_text

    report = conmoe_edge.evaluate(package, text=text, **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = evaluation_set(read_text(text), tokenizer, length=32, tokens=160)
    plain = AutoModelForCausalLM.from_pretrained(model)
    packed = conmoe_edge.load(package, budget="2GiB", device="cpu")
    before = losses(plain, tokens.ids, tokens.mask)
    after = losses(packed, tokens.ids, tokens.mask)
    assert report.quality.tokens == len(before)
    assert report.quality.reference_loss == pytest.approx(float(before.mean()), abs=1e-5)
    assert report.quality.loss == pytest.approx(float(after.mean()), abs=1e-5)
    assert report.quality.perplexity == pytest.approx(math.exp(float(after.mean())), rel=1e-5)
    assert sorted(report.per_domain) == ["code", "prose"]
    assert sum(q.tokens for q in report.per_domain.values()) == report.quality.tokens
    assert report.reference is not None and report.reference.origin is True
    assert report.model.method == "auto" and report.model.rate == 0.5


def test_it_is_the_receipt_where_text_and_tokens_are_the_same(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = conmoe_edge.fit(
        str(model),
        out,
        budget="2GiB",
        device="cpu",
        precision="int8",
        dense_precision="int8",
        rate=0.5,
        calibration_tokens=1024,
        offline=True,
    )
    report = conmoe_edge.evaluate(
        out, tokens=256, sequence_length=128, continuations=0, device="cpu", offline=True
    )
    wanted, found = made.receipt, report.quality
    assert found.loss == wanted["loss_consolidated"]
    assert found.reference_loss == wanted["loss_original"]
    assert found.kl == wanted["kl"]
    assert found.top1_agreement == wanted["top1_agreement"]
    assert found.overlap == wanted["overlap"]
    assert {name: q.loss for name, q in report.per_domain.items()} == {
        name: row["loss_consolidated"] for name, row in wanted["per_domain"].items()
    }


def test_the_same_call_gives_the_same_numbers_and_a_seed_takes_other_text(
    package: Path, text: Path
) -> None:
    one = conmoe_edge.evaluate(package, text=text, **SMALL)
    other = conmoe_edge.evaluate(package, text=text, **SMALL)
    drawn = conmoe_edge.evaluate(package, text=text, **{**SMALL, "seed": 5})
    assert (one.quality, one.continuations) == (other.quality, other.continuations)
    assert drawn.quality != one.quality and drawn.quality.tokens == one.quality.tokens
    json.dumps(one.to_json(), allow_nan=False)


def test_a_model_beside_itself_differs_in_nothing(model: Path, text: Path) -> None:
    report = conmoe_edge.evaluate(model, against=model, text=text, **SMALL)
    q = report.quality
    assert (q.loss, q.kl, q.top1_agreement) == (q.reference_loss, 0.0, 1.0)
    assert q.overlap == pytest.approx(1.0, abs=1e-5)
    assert report.continuations is not None and report.continuations.common_tokens == 6


def test_a_model_alone_has_the_loss_that_it_has_as_a_reference(
    model: Path, package: Path, text: Path
) -> None:
    alone = conmoe_edge.evaluate(model, text=text, **SMALL)
    beside = conmoe_edge.evaluate(package, text=text, **SMALL)
    assert alone.reference is None and alone.quality.kl is None and alone.alone
    assert alone.quality.loss == beside.quality.reference_loss
    assert alone.continuations is not None and beside.continuations is not None
    assert alone.continuations.repetition == beside.continuations.reference_repetition


def test_two_packages_are_compared(model: Path, package: Path, text: Path, tmp_path: Path) -> None:
    mild = fitted(model, text, tmp_path / "mild", rate=0.25)
    report = conmoe_edge.evaluate(package, against=mild, text=text, **SMALL)
    assert report.reference is not None and report.reference.kind == "package"
    assert report.reference.rate == 0.25 and report.reference.origin is None
    assert report.quality.kl is not None and report.quality.kl > 0
    assert report.reference.experts_bytes > report.model.experts_bytes


# where the source is


def test_a_source_that_is_gone_leaves_the_package_alone(
    model: Path, text: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "model"
    shutil.copytree(model, moved)
    out = fitted(moved, text, tmp_path / "out", rate=0.5)
    shutil.rmtree(moved)
    report = conmoe_edge.evaluate(out, text=text, **SMALL)
    assert report.reference is None and "is not on this machine" in report.alone
    with pytest.raises(ModelNotFound):
        conmoe_edge.evaluate(out, against=moved, text=text, **SMALL)
    named = conmoe_edge.evaluate(out, against=model, text=text, **SMALL)
    assert named.reference is not None and named.reference.origin is True


def test_a_source_that_has_changed_is_refused(text: Path, tmp_path: Path) -> None:
    model = save_tiny("olmoe", tmp_path / "model")
    save_tokenizer(model)
    out = fitted(model, text, tmp_path / "out", rate=0.5)
    save_tiny("olmoe", model, seed=1)
    with pytest.raises(CheckpointError, match="is not the model") as caught:
        conmoe_edge.evaluate(out, text=text, **SMALL)
    assert "has changed" in caught.value.why and "--against none" in caught.value.fix
    assert conmoe_edge.evaluate(out, against="none", text=text, **SMALL).reference is None
    other = conmoe_edge.evaluate(out, against=model, text=text, **SMALL)
    assert other.reference is not None and other.reference.origin is False


def test_fingerprints_of_a_copy_and_of_the_hubs_cache_are_of_one_model() -> None:
    cached = {"config": "c", "files": {"a": {"size": 5, "sha256": "1"}}, "id": "x"}
    copied = {"config": "c", "files": {"a": {"size": 5, "sampled": "2"}}, "id": "y"}
    assert differs(cached, copied) == ""
    assert differs(cached, {**copied, "files": {"a": {"size": 6, "sampled": "2"}}})
    assert differs(cached, {**copied, "config": "d"})
    assert differs(cached, {**copied, "files": {}})


def test_other_tokenizers_are_refused(package: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        conmoe_edge.evaluate(package, against="demo", text=text, **SMALL)


def test_text_that_is_too_short_or_not_there(package: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one two", encoding="utf-8")
    with pytest.raises(CalibrationError, match="only"):
        conmoe_edge.evaluate(package, text=short, **SMALL)
    with pytest.raises(CalibrationError, match="cannot be read") as caught:
        conmoe_edge.evaluate(package, text=tmp_path / "no.txt", **SMALL)
    assert "--text" in caught.value.fix


# continuations


@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES])
@pytest.mark.parametrize("held", [True, False])
def test_greedy_tokens_are_those_of_the_plain_model(
    family: str, held: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from conmoe_edge.model.bridge import read_config

    folder = save_tiny(family, tmp_path / "model")
    prompts = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    with open_subject(folder, CPU) as subject:
        found = continue_greedily(subject, prompts, 5, held=held, clock=Clock())
    model = AutoModelForCausalLM.from_pretrained(folder, config=read_config(str(folder))).eval()
    wanted = prompts
    for _ in range(5):  # without a cache: every step anew
        with torch.no_grad():
            logits = model(input_ids=wanted, use_cache=False).logits[:, -1]
        wanted = torch.cat([wanted, logits.argmax(-1, keepdim=True)], dim=1)
    assert found.tolist() == wanted[:, 12:].tolist()


def test_a_package_continues_as_it_does_when_it_is_loaded(package: Path) -> None:
    prompts = torch.randint(5, 90, (2, 10), generator=torch.Generator().manual_seed(2))
    with open_subject(package, CPU) as subject:
        found = continue_greedily(subject, prompts, 6, held=False, clock=Clock())
    model: Any = conmoe_edge.load(package, budget="2GiB", device="cpu")
    for row, prompt in enumerate(prompts):
        out = model.generate(
            prompt[None], max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert out[0, 10:].tolist() == found[row].tolist()


def test_repetition_counts_four_grams() -> None:
    assert repetition([[1, 2, 3, 4, 5, 6, 7]]) == 0.0
    assert repetition([[1] * 8]) == pytest.approx(1 - 1 / 5)
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 - 4 / 5)
    assert repetition([[1] * 8, [1, 2, 3, 4, 5], [1, 2]]) == pytest.approx((0.8 + 0.0) / 2)
    assert repetition([[1, 2, 3], []]) is None


def test_continuations_end_before_their_end_token_and_part_where_they_differ() -> None:
    assert cut([[4, 5, 2, 6], [2], [7, 7]], {2}) == [[4, 5], [], [7, 7]]
    assert common_start([[1, 2, 3], [1, 2, 3]], [[1, 9, 3], [1, 2, 3]]) == 2.0
