"""Training of the demo model: a run that was killed goes on as if it had not been."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "conmoe_edge" / "data" / "texts" / "calibration.txt"
STEPS = 8
SETTINGS = (
    *(
        "--tokens",
        str(256 * STEPS),
        "--batch-tokens",
        "256",
        "--length",
        "64",
        "--long-length",
        "128",
    ),
    *("--log-steps", "1", "--save-seconds", "0", "--threads", "1"),
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The train files, from the text that ships."""
    folder = tmp_path_factory.mktemp("corpora")
    texts: dict[str, list[str]] = {}
    for part in TEXT.read_text(encoding="utf-8").split("<|document domain=")[1:]:
        domain, _, text = part.partition("|>\n")
        texts.setdefault(domain, []).append(text)
    for domain, documents in texts.items():
        (folder / f"{domain}.train.txt").write_text("\n\n\n".join(documents), encoding="utf-8")
    return folder


def _command(corpora: Path, work: Path, *more: str) -> list[str]:
    script = str(ROOT / "tools" / "train_demo.py")
    return [
        sys.executable,
        script,
        "--corpora",
        str(corpora),
        "--work",
        str(work),
        *SETTINGS,
        *more,
    ]


def _run(corpora: Path, work: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(corpora, work, *more), capture_output=True, text=True)


def _interrupted(corpora: Path, work: Path, number: signal.Signals, *more: str) -> str:
    """Run until the second line of a step, then send the signal; return what was printed."""
    lines = []
    with subprocess.Popen(
        _command(corpora, work, *more), stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if sum(" step " in each and "loss" in each for each in lines) == 2:
                process.send_signal(number)
    return "".join(lines)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it imports its neighbour by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("train_demo")


def _training(script: Any, seed: int) -> Any:
    """A run over random streams, with a model that is shaped as the demo's and small."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    rng = np.random.default_rng(7)
    streams = {name: rng.integers(6, 60, 4000, dtype=np.int32) for name in script.MIXTURE}
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = OlmoeForCausalLM(config).train()
    model.set_experts_implementation("sorted_unbound")
    sampler = script.Sampler(streams, np.random.default_rng(seed))
    return script.Training(model, script.make_optimisers(model, _options()), sampler, {"seed": 1})


def _options(**more: Any) -> argparse.Namespace:
    own = {"tokens": 512 * STEPS, "batch_tokens": 512, "length": 32, "long_length": 64}
    own |= {"long_from": 0.5, "warmup": 0.1, "optimizer": "muon", "lr": 4e-3, "muon_lr": 8e-3}
    own |= {"ns_steps": 4, "bf16": False, "device": "cpu", "log_steps": 1, "save_seconds": 1e9}
    return argparse.Namespace(**own | more)


class _After:
    """A stop flag that is set when it has been looked at so many times."""

    def __init__(self, looks: int) -> None:
        self._left = looks

    @property
    def set(self) -> bool:
        self._left -= 1
        return self._left < 0


def test_a_run_from_a_checkpoint_is_the_same_run(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    whole = _training(script, 1)
    script.take_steps(whole, _options(), path, _After(1000))
    first = _training(script, 1)
    script.take_steps(first, _options(), path, _After(3))
    first.save(path)
    second = _training(script, 2)
    second.load(path)
    assert second.run.step == 3
    script.take_steps(second, _options(), path, _After(1000))
    assert second.run.step == STEPS and second.run.history == whole.run.history
    assert second.sampler.drawn == whole.sampler.drawn
    ours, theirs = second.model.state_dict(), whole.model.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    losses = [entry["loss"] for entry in whole.run.history]
    assert losses[-1] < losses[0]


def test_other_settings_and_other_corpora_are_refused(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    _training(script, 1).save(path)
    other = _training(script, 1)
    other.settings = {"seed": 2}
    with pytest.raises(SystemExit, match="has --seed 1, not 2"):
        other.load(path)
    other = _training(script, 1)
    other.sampler.streams["wiki"] = other.sampler.streams["wiki"][:-1]
    with pytest.raises(SystemExit, match="corpora have changed"):
        other.load(path)


def test_the_schedule_follows_tokens(script: Any) -> None:
    assert [script.token_count(text) for text in ("30M", "1.5k", "8192")] == [
        30_000_000,
        1500,
        8192,
    ]
    scales = [script.lr_scale(share, 0.02) for share in (0.0, 0.01, 0.02, 0.51, 1.0)]
    assert scales == pytest.approx([0.01, 0.51, 1.0, 0.51, 0.02])


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(corpora: Path, tmp_path: Path) -> None:
    whole = _run(corpora, tmp_path / "whole", "--out", str(tmp_path / "a"))
    assert whole.returncode == 0, whole.stderr
    killed = _interrupted(corpora, tmp_path / "killed", signal.SIGKILL)
    assert f"step {STEPS} " not in killed
    stopped = _interrupted(corpora, tmp_path / "killed", signal.SIGTERM, "--resume")
    assert re.search(r"resumed at step [12],", stopped), stopped
    assert "--resume goes on" in stopped
    last = _run(corpora, tmp_path / "killed", "--resume", "--out", str(tmp_path / "b"))
    assert last.returncode == 0, last.stderr

    def history(name: str) -> list[dict]:
        return json.loads((tmp_path / name / "run.json").read_text())["history"]

    assert [entry["step"] for entry in history("whole")] == list(range(1, STEPS + 1))
    assert history("killed") == history("whole")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)

    # A finished run is not overwritten, and one with other settings is refused by name.
    again = _run(corpora, tmp_path / "whole")
    assert again.returncode != 0 and "--resume" in again.stderr
    other = _run(corpora, tmp_path / "whole", "--resume", "--muon-lr", "0.1")
    assert other.returncode != 0 and "--muon-lr 0.008, not 0.1" in other.stderr
