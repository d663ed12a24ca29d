"""Code planted in a source or in a package is neither run nor asked about, whoever would answer ``y``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, save_tokenizer, tiny_model
from hand_packages import identity, write_package

from tests.patience import PATIENCE

# Each folder is opened in every way, one after the other; what refuses it says so and the next one is tried.
OPEN_ALL = """
import sys
from pathlib import Path
from conmoe_edge import api, load
from conmoe_edge.errors import ConmoeError
from conmoe_edge.model.tokenizers import load_tokenizer

def plan(folder):
    api.plan(folder, budget="4GB")

def tokenizer(folder):
    load_tokenizer(Path(folder))

for way in (plan, load, tokenizer):
    for folder in sys.argv[1:]:
        try:
            way(folder)
            print(way.__name__, folder, "opened")
        except ConmoeError as error:
            print(way.__name__, folder, "refused", error.what)
"""
PLANTED = "planted"
KINDS = {
    "Config": "AutoConfig",
    "Model": "AutoModelForCausalLM",
    "Tokenizer": "AutoTokenizer",
    "Processor": "AutoProcessor",
}
FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def plant(folder: Path, marker: Path, **config: Any) -> None:
    """A module that writes ``marker`` when it is imported, named by every file that can name one."""
    classes = "\n".join(f"class {name}: pass" for name in KINDS)
    (folder / f"{PLANTED}.py").write_text(f"open({str(marker)!r}, 'w').close()\n{classes}\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    for file in FILES:
        path = folder / file
        settings = json.loads(path.read_text()) if path.exists() else {}
        settings["auto_map"] = {auto: f"{PLANTED}.{name}" for name, auto in KINDS.items()}
        settings["auto_map"]["AutoTokenizer"] = [f"{PLANTED}.Tokenizer", f"{PLANTED}.Tokenizer"]
        settings["trust_remote_code"] = True
        if file == "config.json":
            settings.update(config)
        if file == "tokenizer_config.json":
            settings["tokenizer_class"] = "Tokenizer"
        if file == "generation_config.json":
            settings["custom_generate"] = str(folder)
        path.write_text(json.dumps(settings))


@pytest.mark.parametrize("answers", ["y", "closed"])
def test_no_code_of_a_folder_is_run(tmp_path: Path, answers: str) -> None:
    marker = tmp_path / "ran"
    folders = []
    # The second and third are known to transformers, but not as causal language models.
    for name in ("olmoe", "qwen3_vl_moe", "t5", "unheard_of"):
        source, package = tmp_path / f"source-{name}", tmp_path / f"package-{name}"
        save_tiny("olmoe", source)
        model = tiny_model("olmoe")
        write_package(model, package, identity(model))
        for folder in (source, package):
            save_tokenizer(folder)
            plant(folder, marker, model_type=name)
            folders.append(str(folder))
    questions = tmp_path / "answers"
    questions.write_text("y\n" * 100)
    stdin = os.open(questions if answers == "y" else os.devnull, os.O_RDONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", OPEN_ALL, *folders],
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "HF_HOME": str(tmp_path / "hub")},
        )
        asked = os.lseek(stdin, 0, os.SEEK_CUR) if answers == "y" else 0
    finally:
        os.close(stdin)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 3 * len(folders), done.stdout
    assert f"plan {folders[0]} opened" in done.stdout
    assert not marker.exists()
    assert asked == 0
    assert "custom code" not in done.stdout + done.stderr
