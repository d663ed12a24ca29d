"""The small files of a model travel, and nothing else does."""

from __future__ import annotations

from pathlib import Path

from conmoe_edge.checkpoint.package.sidefiles import copy_side_files, side_files

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
