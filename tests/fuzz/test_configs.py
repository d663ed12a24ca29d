"""Damaged and hostile small files: every command ends with a result or an error of ours, soon and in little memory.

``CONMOE_FUZZ_CASES=5000 pytest tests/fuzz/test_configs.py`` runs many; a failure names its seed, and
``CONMOE_FUZZ_SEED`` runs that case alone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from families import save_tiny, save_tokenizer, tiny_model
from fuzz.cases import random_of, seeds
from fuzz.config_edits import FILES, READ_BY_PLAN, edit
from fuzz.forked_command import SECONDS, Outcome, run_command
from hand_packages import thirds, write_package

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

SOURCES = ("olmoe", "qwen3_moe", "gpt_oss", "deepseek_v2", "mixtral", "minimax", "qwen3_5_moe_text")
PACKAGES = ("olmoe", "gpt_oss", "qwen3_moe")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}answer: "
GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 4,
    "eos_token_id": [2],
    "pad_token_id": 0,
}
_NOISE = (
    "Traceback",
    "not foreseen",
    "Warning",
    "[transformers]",
    "panicked",
    "[huggingface",
    "site-packages",
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(``source`` or ``package``, family) -> a whole one; made once, and the libraries are warm afterwards."""
    root = tmp_path_factory.mktemp("whole")

    def make(kind: str, family: str) -> Path:
        folder = root / f"{kind}-{family}"
        if folder.exists():
            return folder
        if kind == "source":
            save_tiny(family, folder)
            _with_index(folder)
        else:
            model = tiny_model(family)
            write_package(model, folder, thirds(model))
        save_tokenizer(folder)
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return folder

    return make


def _with_index(folder: Path) -> None:
    """The same weights with an index, as large models have them."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="np") as file:
        names = list(file.keys())
    name = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "plan": lambda model, out: ["plan", str(model), "--gpu", "4GB", "--device", "cpu", "--offline"],
    "fit": lambda model, out: [
        *(
            "fit",
            str(model),
            "--gpu",
            "4GB",
            "--device",
            "cpu",
            "--rate",
            "0.5",
            "--method",
            "conmoe",
        ),
        *("--calibration-tokens", "512", "--offline", "--yes", "--out", str(out)),
    ],
    "chat": lambda model, out: [
        *(
            "chat",
            str(model),
            "--gpu",
            "4GB",
            "--device",
            "cpu",
            "--prompt",
            "hi there",
            "--max-tokens",
            "4",
        ),
    ],
    "inspect": lambda model, out: ["inspect", str(model)],
}


def case(seed: int, models: Callable[[str, str], Path], folder: Path) -> tuple[str, Outcome]:
    """What the case of a seed did, and what came of it."""
    random = random_of(seed)
    command = random.choices(("plan", "fit", "chat", "inspect"), (45, 8, 42, 5))[0]
    kind, families = ("source", SOURCES) if command in ("plan", "fit") else ("package", PACKAGES)
    family = random.choice(families)
    target = folder / "model"
    shutil.copytree(models(kind, family), target, copy_function=_link_weights)
    done = edit(target, random, READ_BY_PLAN if command == "plan" else tuple(FILES))
    screen = folder / "screen"
    screen.mkdir()
    outcome = run_command(COMMANDS[command](target, folder / "out"), screen)
    return f"seed {seed}: {command} {family}: {done}", outcome


def _link_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


def fault(outcome: Outcome) -> str:
    """What the outcome breaks of the promise; empty where it keeps it."""
    if outcome.status not in (0, 1, 2, 3):
        return f"ended by {outcome.status} after {outcome.seconds:.1f} s (the limit is {SECONDS} s of CPU)"
    screen = outcome.out + outcome.err
    noise = [word for word in _NOISE if word in screen]
    if noise:
        return f"the screen shows {noise}"
    if outcome.sockets:
        return f"it used sockets: {outcome.sockets.split()}"
    if outcome.status == 0:
        # An answer may be nothing but an end mark; its figures are there all the same.
        said = outcome.out.strip() or "tok/s" in outcome.err or "package" in outcome.err
        return "" if said else "it was done and said nothing"
    lines = outcome.err.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
    if first is None or len(lines) - first > 3:
        return "the error is not three lines"
    return ""


def test_damaged_small_files(models: Callable[[str, str], Path], tmp_path: Path) -> None:
    faults = []
    os.environ["CONMOE_CACHE_DIR"] = str(tmp_path / "cache")
    from conmoe_edge.cli.main import main  # noqa: F401  # warm before the first fork
    from conmoe_edge.integrations.load import load_package  # noqa: F401

    for seed in seeds(16):
        folder = tmp_path / str(seed)
        folder.mkdir()
        done, outcome = case(seed, models, folder)
        if why := fault(outcome):
            faults.append(f"{done}\n  {why}\n  {outcome.err[-600:]}")
        shutil.rmtree(folder)
    assert not faults, "\n".join(faults)


def test_whole_models_pass(models: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Otherwise the fuzzer would test refusals alone."""
    for command, words in COMMANDS.items():
        folder = tmp_path / command
        folder.mkdir()
        model = models("source" if command in ("plan", "fit") else "package", "olmoe")
        outcome = run_command(words(model, tmp_path / "out"), folder)
        assert outcome.status == 0 and not fault(outcome), outcome
