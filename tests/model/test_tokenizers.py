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
