"""Tasks of lm-eval on a loaded package, from files on this disk."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tokenizer, tiny_model
from hand_packages import thirds, write_package

import conmoe_edge
from conmoe_edge.errors import ConmoeError, PackageError, UsageError
from tests.patience import PATIENCE

QUESTIONS = (
    ("abc abc ab", ["c", "zz"], 0),
    ("the sun rises in the", ["north", "east", "x"], 1),
    ("one two three", ["four", "4"], 0),
    ("if x:", ["return", "y"], 1),
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("olmoe")
    folder = write_package(model, tmp_path_factory.mktemp("packages") / "out", thirds(model))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    data = folder / "tiny.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "tiny.yaml").write_text(
        f"""task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data.as_posix()}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
        encoding="utf-8",
    )
    return folder


def right_answers(model: Any, tokenizer: Any) -> float:
    """The share by hand: the choice whose tokens are likeliest after the question and a blank."""
    right = 0
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            whole = tokenizer(f"{question} {choice}", add_special_tokens=False).input_ids
            start = len(tokenizer(question, add_special_tokens=False).input_ids)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
            found = torch.log_softmax(logits.float(), -1)
            scores.append(sum(float(found[at - 1, whole[at]]) for at in range(start, len(whole))))
        right += scores.index(max(scores)) == answer
    return right / len(QUESTIONS)


def test_a_task_from_a_file_is_scored_as_by_hand(
    package: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    report = conmoe_edge.evaluate_tasks(
        package, ["tiny_choice"], tasks_path=tasks, budget="1GiB", device="cpu"
    )
    from transformers import AutoTokenizer

    model = conmoe_edge.load(package, budget="1GiB", device="cpu")
    (score,) = report.scores
    assert (score.task, score.metric, score.examples) == ("tiny_choice", "acc", 4)
    assert score.higher_is_better is True and score.fewshot == 0
    assert score.value == right_answers(model, AutoTokenizer.from_pretrained(package))
    json.dumps(report.to_json(), allow_nan=False)
    limited = conmoe_edge.evaluate_tasks(
        package, ["tiny_choice"], tasks_path=tasks, limit=2, budget="1GiB", device="cpu"
    )
    assert limited.scores[0].examples == 2


@pytest.mark.slow  # lm-eval reads all of its own task files to say that there is none
def test_lm_evals_own_door_checks_the_package(package: Path, tmp_path: Path) -> None:
    """``lm_eval --model hf --model_args pretrained=DIR`` comes this way."""
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
    copy = Path(shutil.copytree(package, tmp_path / "package"))
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PackageError, match="pickle"):
        huggingface.HFLM(pretrained=str(copy), device="cpu", batch_size=1)


def test_unknown_tasks(package: Path, tasks: Path) -> None:
    with pytest.raises(UsageError, match="no task called 'no_such'"):
        conmoe_edge.evaluate_tasks(package, ["no_such"], tasks_path=tasks, device="cpu")


def test_a_folder_of_tasks_that_is_not_there(package: Path, tasks: Path) -> None:
    with pytest.raises(UsageError, match="There is no folder"):
        conmoe_edge.evaluate_tasks(package, ["x"], tasks_path=tasks / "no", device="cpu")


def test_data_that_is_not_there_is_one_clear_error(package: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.yaml").write_text(
        f"""task: gone_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {(tmp_path / "gone.jsonl").as_posix()}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
""",
        encoding="utf-8",
    )
    with pytest.raises(ConmoeError, match="lm-eval could not run gone_choice"):
        conmoe_edge.evaluate_tasks(
            package, ["gone_choice"], tasks_path=tmp_path, budget="1GiB", device="cpu"
        )


def test_without_the_extra_the_error_says_how_to_install_it(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "lm_eval" else real(name, *rest),
    )
    with pytest.raises(UsageError) as caught:
        conmoe_edge.evaluate_tasks(package, ["arc_easy"], device="cpu")
    assert caught.value.fix == "pip install 'lm-eval>=0.4.9'"


@pytest.mark.parametrize("words", [["--help"], ["eval", "--help"]])
def test_help_imports_neither_lm_eval_nor_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom conmoe_edge.cli.main import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lm_eval', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout
