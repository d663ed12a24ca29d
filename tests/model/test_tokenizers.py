"""Opening a model's tokenizer, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conmoe_edge.errors import CalibrationError
from conmoe_edge.model.tokenizers import load_tokenizer

DEMO = Path(__file__).parents[2] / "conmoe_edge" / "data" / "demo"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(DEMO / name, tmp_path / name)
    return tmp_path


def test_it_reads_a_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("The river runs").input_ids) == "The river runs"


def _missing(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink()


def _cut(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[:100])


@pytest.mark.parametrize("damage", [_missing, _cut])
def test_what_cannot_be_used_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(CalibrationError, match="no tokenizer that can be used"):
        load_tokenizer(folder)


def test_code_in_the_folder_does_not_run(folder: Path) -> None:
    code = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(code)
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    with contextlib.suppress(CalibrationError):  # transformers may have a class of its own for it
        load_tokenizer(folder)
    assert not (folder / "ran").exists()


def _settings(folder: Path, **fields: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _tokenizer(folder: Path, **fields: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _deep(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[" * 100_000)


def _link(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    "damage",
    [
        _deep,
        _link,
        lambda folder: _settings(folder, tokenizer_class="pipeline"),
        lambda folder: _settings(folder, tokenizer_class="AutoModelForCausalLM"),
        lambda folder: _settings(folder, tokenizer_class=5),
        lambda folder: _settings(folder, model_max_length="long"),
        lambda folder: _settings(folder, chat_template=[{"name": 1}]),
        lambda folder: _settings(folder, added_tokens_decoder={"0": 5}),
        lambda folder: _settings(folder, auto_map=5),
        lambda folder: _tokenizer(folder, model=[]),
        lambda folder: _tokenizer(folder, post_processor={"type": "evil"}),
        lambda folder: _tokenizer(folder, added_tokens=[{"id": 10**30}]),
    ],
)
def test_damage_is_one_line(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(CalibrationError, match="no tokenizer that can be used") as caught:
        load_tokenizer(folder)
    assert caught.value.why and "\n" not in str(caught.value)


def test_a_file_cannot_name_other_files(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "tokenizer.json"
    other.write_text("{}")
    before = load_tokenizer(folder)("The river runs").input_ids
    for name in ("tokenizer_file", "vocab_file", "special_tokens_map_file"):
        _settings(folder, **{name: str(other)})
        with pytest.raises(CalibrationError, match="names a file outside"):
            load_tokenizer(folder)
    named = ("tokenizer_file", "vocab_file", "special_tokens_map_file", "gguf_file")
    gone = dict.fromkeys(named, str(other.with_name("gone.json")))
    _settings(folder, **gone, name_or_path=str(other), fast_tokenizer_files=["tokenizer.0.json"])
    tokenizer = load_tokenizer(folder)
    assert tokenizer("The river runs").input_ids == before
    assert tokenizer.name_or_path == str(folder)


def test_a_file_cannot_cut_or_fill_prompts(folder: Path) -> None:
    before = load_tokenizer(folder)("The river runs").input_ids
    pad = {
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
        "pad_to_multiple_of": None,
    }
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    _tokenizer(folder, padding={"strategy": {"Fixed": 4096}, **pad}, truncation=cut)
    assert load_tokenizer(folder)("The river runs").input_ids == before


def test_tokens_that_the_model_does_not_know_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    most = max(load_tokenizer(folder).get_vocab().values())
    path.write_text(json.dumps({**config, "vocab_size": most + 1}))
    load_tokenizer(folder)
    path.write_text(json.dumps({**config, "vocab_size": most}))
    with pytest.raises(CalibrationError, match="does not belong to the model") as caught:
        load_tokenizer(folder)
    assert f"to {most}, and the model knows {most}" in caught.value.why
