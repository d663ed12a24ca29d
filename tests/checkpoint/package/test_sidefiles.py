"""The small files of a model travel, and nothing else does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.package.sidefiles import copy_side_files, side_files
from conmoe_edge.errors import CheckpointError

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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (folder.parent.parent / "blobs").mkdir()
    (tmp_path / "target").mkdir()
    return folder


def test_links_of_the_hub_cache_arrive_as_content(source: Path, tmp_path: Path) -> None:
    (source.parent.parent / "blobs" / "ab12").write_text("content")
    (source / "tokenizer.json").symlink_to("../../blobs/ab12")
    target = tmp_path / "target"
    copy_side_files(source, target)
    assert (target / "tokenizer.json").read_text() == "content"
    assert not (target / "tokenizer.json").is_symlink()


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "LICENSE", "README.md", "tokenizer.json", "vocab.txt"]
)
def test_a_link_that_leaves_the_folder_is_an_error(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} is a link that leaves"):
        copy_side_files(source, tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.timeout(10)
def test_dangling_links_and_pipes_are_errors(source: Path, tmp_path: Path) -> None:
    (source / "vocab.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        copy_side_files(source, tmp_path / "target")
    (source / "vocab.json").unlink()
    os.mkfifo(source / "merges.txt")
    with pytest.raises(CheckpointError, match=r"merges\.txt is not a plain file"):
        copy_side_files(source, tmp_path / "target")
