"""Free space is checked and said; the small files travel, and nothing else does."""

from __future__ import annotations

import errno
from collections import namedtuple
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.fs import disk
from conmoe_edge.checkpoint.package.sidefiles import copy_side_files, side_files
from conmoe_edge.errors import ConmoeError, NoSpace
from conmoe_edge.units import GIB

Usage = namedtuple("Usage", "total used free")


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(9 * GIB, 6 * GIB, 3 * GIB))
    disk.require_space(tmp_path / "not" / "there" / "yet", 3 * GIB)
    with pytest.raises(NoSpace) as caught:
        disk.require_space(tmp_path / "out", 8 * GIB)
    assert "8.00 GiB" in caught.value.why and "3.00 GiB" in caught.value.why
    assert "5.00 GiB" in caught.value.fix


def test_space_is_asked_of_the_disk_that_exists(tmp_path: Path) -> None:
    assert disk.existing_parent(tmp_path / "a" / "b") == tmp_path
    assert disk.free_bytes(tmp_path / "a") > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_no_traceback(code: int, tmp_path: Path) -> None:
    with pytest.raises(NoSpace), disk.disk_errors(tmp_path):
        raise OSError(code, "full")


def test_other_errors_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ConmoeError, match="Permission denied"), disk.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


TRAVEL = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "README.md",
}
STAY = {
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "modeling_evil.py",
    "tokenizer.py",
    "tokenizer.pkl",
    "LICENSE.py",
    "training_args.bin",
    ".gitattributes",
    "image.png",
}


def test_what_travels(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in TRAVEL | STAY:
        (source / name).write_text(name)
    (source / "tokenizer_folder.json").mkdir()
    assert {path.name for path in side_files(source)} == TRAVEL
    written = copy_side_files(source, target)
    assert {file.name for file in written} == TRAVEL - {"README.md"} | {"MODEL_CARD.md"}
    assert (target / "MODEL_CARD.md").read_text() == "README.md"
    assert {path.name for path in target.iterdir()} == {file.name for file in written}


def test_links_arrive_as_content(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "blob").write_text("content")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    (source / "vocab.json").symlink_to(tmp_path / "gone")
    copy_side_files(source, target)
    assert (target / "tokenizer.json").read_text() == "content"
    assert not (target / "tokenizer.json").is_symlink()
    assert not (target / "vocab.json").exists()
