"""The small files of a model travel, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.package.sidefiles import copy_side_files, side_files
from conmoe_edge.errors import CheckpointError
from conmoe_edge.model.tokenizers import load_tokenizer
from conmoe_edge.offload.generation.named_templates import templates_of

DEMO = Path(__file__).resolve().parents[3] / "conmoe_edge" / "data" / "demo"
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


def test_dangling_links_and_pipes_are_errors(source: Path, tmp_path: Path) -> None:
    (source / "vocab.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        copy_side_files(source, tmp_path / "target")
    (source / "vocab.json").unlink()
    os.mkfifo(source / "merges.txt")
    with pytest.raises(CheckpointError, match=r"merges\.txt is not a plain file"):
        copy_side_files(source, tmp_path / "target")


def with_templates(source: Path, **templates: str) -> Path:
    """A tokenizer with these templates in a folder of their own."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / name, source / name)
    (source / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        (source / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return source


@pytest.mark.parametrize("default", ["file", "settings", "list", "none"])
def test_templates_in_a_folder_of_their_own_travel(
    default: str, source: Path, tmp_path: Path
) -> None:
    """The package's tokenizer has all templates that transformers finds in the model's folder, under the same names."""
    with_templates(source, tool_use="{{ tools }}", rag="{{ documents }}")
    path = source / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
    if default == "file":
        (source / "chat_template.jinja").write_text("{{ messages }}")
    elif default == "settings":
        settings["chat_template"] = "{{ messages }}"
    elif default == "list":
        (source / "chat_template.jinja").write_text("{{ messages }}")
        settings["chat_template"] = [{"name": "rag", "template": "old"}]
    path.write_text(json.dumps(settings))
    wanted = {"rag": "{{ documents }}", "tool_use": "{{ tools }}"}
    if default != "none":
        wanted["default"] = "{{ messages }}"
    target = tmp_path / "target"
    written = copy_side_files(source, target)
    shutil.copy(source / "config.json", target / "config.json")
    found = templates_of(load_tokenizer(target))
    assert found == wanted
    if default in ("file", "list"):  # transformers reads the folder only beside that file
        assert found == templates_of(load_tokenizer(source))
    assert {one.name for one in written} == {"tokenizer.json", "tokenizer_config.json"}
    assert all(path.is_file() for path in target.iterdir())


def test_damaged_templates_are_errors(source: Path, tmp_path: Path) -> None:
    with_templates(source, tool_use="x")
    inside, target = source / "additional_chat_templates", tmp_path / "target"
    (inside / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"bytes\.jinja is no text"):
        copy_side_files(source, target)
    (inside / "bytes.jinja").unlink()
    (inside / "away.jinja").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(CheckpointError, match=r"away\.jinja"):
        copy_side_files(source, target)
    (inside / "away.jinja").unlink()
    for number in range(65):
        (inside / f"{number}.jinja").write_text("x")
    with pytest.raises(CheckpointError, match="holds 66 templates"):
        copy_side_files(source, target)
