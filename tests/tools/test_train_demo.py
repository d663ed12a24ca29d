"""Training of the demo model: a run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
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
