"""Tokenizers of SentencePiece's and tiktoken's own files: the libraries open them, or ``plan`` refuses and says why.

``data/tokenizers`` has two real ones: 400 tokens by SentencePiece's trainer (BPE, bytes behind) and 380 by tiktoken's,
on the beginning of the calibration text. The libraries are no dependencies; where they are missing, so are the tests
of what they read.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from conmoe_edge import api
from conmoe_edge.errors import CalibrationError
from conmoe_edge.model.tokenizers import load_tokenizer, tried_tokenizer
from tests.families import save_tiny

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
SENTENCEPIECE, TIKTOKEN = DATA / "sentencepiece.model", DATA / "ranks.tiktoken"
LINE = "The river runs to the sea, and the ships wait for a wind: 1234."
SPECIAL = {"380": "[BOS]", "381": "[EOS]"}


def repository(
    folder: Path, kind: str, vocabulary: Path, name: str, own_class: str = "", **settings: object
) -> Path:
    """The small files of a model: its kind, its vocabulary under a name, and the class of its own code."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 512}))
    shutil.copy(vocabulary, folder / name)
    if own_class:
        file = f"tokenization_{kind}"
        settings["auto_map"] = {"AutoTokenizer": [f"{file}.{own_class}", None]}
        settings["tokenizer_class"] = own_class
        (folder / f"{file}.py").write_text(f"raise SystemExit({str(folder)!r})\n")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As on a machine that has none of ``packages``."""
    for name in {*packages, *(one for one in sys.modules if one.split(".")[0] in packages)}:
        monkeypatch.setitem(sys.modules, name, None)
    from conmoe_edge.model import vocabulary_files

    installed = vocabulary_files._is_installed
    monkeypatch.setattr(
        vocabulary_files,
        "_is_installed",
        lambda name: name.split(".")[0] not in packages and installed(name),
    )


def sentencepiece_tokens(text: str) -> list[int]:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    return sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE)).encode(text)


def tiktoken_tokens(text: str) -> list[int]:
    tiktoken = pytest.importorskip("tiktoken")
    load = pytest.importorskip("tiktoken.load")
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    ranks = load.load_tiktoken_bpe(str(TIKTOKEN))
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode(
        text
    )


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v2", "granitemoe", "ernie4_5_moe"])
def test_sentencepiece_alone_opens_as_its_library_reads_it(kind: str, tmp_path: Path) -> None:
    wanted = sentencepiece_tokens(LINE)
    tokenizer = load_tokenizer(
        repository(tmp_path / "m", kind, SENTENCEPIECE, "tokenizer.model", bos_token="<s>")
    )
    found = tokenizer(LINE, add_special_tokens=False)["input_ids"]
    assert found in (wanted, wanted[1:])  # transformers 5.21 puts no blank before the first word
    assert tokenizer.decode(wanted).strip() == LINE


@pytest.mark.parametrize("kind", ["olmoe", "qwen2_moe"])
def test_what_transformers_reads_otherwise_is_refused(kind: str, tmp_path: Path) -> None:
    """For these transformers takes a tokenizer of its own kind, which drops the blanks between words."""
    sentencepiece_tokens(LINE)
    with pytest.raises(CalibrationError, match="no tokenizer that can be used") as error:
        load_tokenizer(repository(tmp_path / "m", kind, SENTENCEPIECE, "tokenizer.model"))
    assert "other tokens than sentencepiece does" in error.value.why
    assert "tokenizer.json" in error.value.fix


@pytest.mark.parametrize(
    ("kind", "own_class"), [("kimi_k25", "TikTokenTokenizer"), ("deepseek_v3", "")]
)
def test_tiktoken_opens_as_its_library_reads_it(kind: str, own_class: str, tmp_path: Path) -> None:
    wanted = tiktoken_tokens(LINE)
    added = {number: {"content": text, "special": True} for number, text in SPECIAL.items()}
    folder = repository(
        tmp_path / "m", kind, TIKTOKEN, "tiktoken.model", own_class, added_tokens_decoder=added
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer(LINE, add_special_tokens=False)["input_ids"] == wanted
    assert tokenizer.decode(wanted) == LINE
    assert tokenizer.convert_tokens_to_ids("[EOS]") == 381


@pytest.mark.parametrize(
    ("vocabulary", "name", "install"),
    [
        (SENTENCEPIECE, "tokenizer.model", "pip install sentencepiece"),
        (TIKTOKEN, "tiktoken.model", "pip install tiktoken"),
        (TIKTOKEN, "tokenizer.model", "pip install tiktoken"),
    ],
)
def test_a_missing_library_is_named(
    vocabulary: Path, name: str, install: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "sentencepiece", "tiktoken")
    with pytest.raises(CalibrationError, match="no tokenizer that can be used") as error:
        load_tokenizer(repository(tmp_path / "m", "mixtral", vocabulary, name))
    assert error.value.fix.startswith(install)
    assert name in error.value.why


@pytest.mark.parametrize(
    ("kind", "name", "own_class"),
    [
        ("deepseek_v3", "tiktoken.model", "TikTokenTokenizer"),  # Moonlight
        ("hunyuan_v1_moe", "hy.tiktoken", "HYTokenizer"),
        ("qwen2_moe", "qwen.tiktoken", "QWenTokenizer"),
    ],
)
def test_a_tokenizer_that_is_a_program_is_refused(
    kind: str, name: str, own_class: str, tmp_path: Path
) -> None:
    folder = repository(tmp_path / "m", kind, TIKTOKEN, name, own_class)
    with pytest.raises(CalibrationError, match="no tokenizer that can be used") as error:
        load_tokenizer(folder)
    assert f"tokenization_{kind}.{own_class}" in error.value.why
    assert "none is ever run" in error.value.why
    assert "conmoe-tokenizer-" not in error.value.why + error.value.fix


def test_plan_and_fit_say_so_before_anything_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_tiny("mixtral", folder)
    shutil.copy(TIKTOKEN, folder / "hy.tiktoken")
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    report = api.plan(str(folder), budget="900MB", device="cpu")
    tried = tried_tokenizer(folder)
    assert report.to_json()["tokenizer"] is False
    assert (report.tokenizer_fault, report.tokenizer_fix) == (tried.why, tried.fix)
    with pytest.raises(CalibrationError) as error:
        api.fit(str(folder), tmp_path / "out", budget="900MB", device="cpu")
    assert "own.Own" in error.value.why and "--no-tokenizer" in error.value.fix
    made = api.fit(str(folder), tmp_path / "out", budget="900MB", device="cpu", no_tokenizer=True)
    with pytest.raises(CalibrationError, match="no tokenizer that can be used"):
        load_tokenizer(made.out)
