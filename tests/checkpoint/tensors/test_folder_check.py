"""A folder that a library may open files in by itself: nothing in it leads out, and nothing sends it elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from conmoe_edge.checkpoint.tensors.folder_check import check_folder
from conmoe_edge.errors import CheckpointError


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.json"
    path.write_text("{}")
    return path


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check_folder(folder)
    return caught.value


def write(folder: Path, name: str, **values: Any) -> None:
    (folder / name).write_text(json.dumps(values))


def test_a_sound_folder(single: Path) -> None:
    write(single, "tokenizer_config.json", tokenizer_class="X", vocab_file=None, unk_token="/")
    write(single, "special_tokens_map.json", bos_token={"content": "/etc"})
    (single / "additional_chat_templates").mkdir()
    (single / "additional_chat_templates" / "tools.jinja").write_text("")
    (single / "onnx").mkdir()
    (single / "modeling_own.py").write_text("")
    check_folder(single)


@pytest.mark.parametrize("name", ["any name at all", "tokenizer.model", "bpe.codes", "x.spm"])
def test_a_link_out_of_any_name(name: str, single: Path, outside: Path) -> None:
    (single / name).symlink_to(outside)
    assert name in refusal(single).what


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_templates(kind: str, single: Path, outside: Path) -> None:
    templates = single / "additional_chat_templates"
    if kind == "folder":
        (outside.parent / "templates").mkdir()
        templates.symlink_to(outside.parent / "templates")
    else:
        templates.mkdir()
        place = templates / "tools.jinja"
        place.symlink_to(outside) if kind == "link" else os.mkfifo(place)
    assert "additional_chat_templates" in refusal(single).what


def test_an_adapter(single: Path) -> None:
    write(single, "adapter_config.json", base_model_name_or_path="org/other")
    error = refusal(single)
    assert "adapter" in error.what and "merge" in error.fix


def test_a_config_that_leads_to_other_files(single: Path) -> None:
    write(single, "config.json", configuration_files=["config.4.0.0.json"])
    assert "configuration_files" in refusal(single).what
    write(single, "config.json", text_config={"transformers_weights": "other.safetensors"})
    assert "transformers_weights" in refusal(single).what
    write(single, "config.json", transformers_weights="model.safetensors")  # that is the one
    check_folder(single)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "spm_file", "source_spm", "vocab"])
def test_a_tokenizer_that_names_a_file(key: str, name: str, single: Path, outside: Path) -> None:
    write(single, name, **{key: str(outside)})
    error = refusal(single)
    assert "outside the folder" in error.what and key in error.why
    write(single, name, **{key: "/nowhere/saved/from/here.json"})
    check_folder(single)
    write(single, name, **{key: {"a": 0}})
    check_folder(single)


def test_a_name_is_looked_up_where_the_process_is(
    single: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(single, "tokenizer_config.json", vocab_file=outside.name)
    check_folder(single)
    monkeypatch.chdir(outside.parent)
    refusal(single)
    (single / outside.name).write_text("{}")
    monkeypatch.chdir(single)
    check_folder(single)


def test_tokenizers_by_version(single: Path) -> None:
    write(single, "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.json"])
    check_folder(single)
    write(single, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"])
    refusal(single)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_damaged_settings(name: str, text: str, single: Path) -> None:
    (single / name).write_bytes(text.encode("latin-1"))
    assert name in refusal(single).what
