"""Without a compiler the commands that answer say so in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_SAY = "from conmoe_edge.api.slow_line import slow_line; import sys; print(slow_line(sys.argv[1]))"


def said(device: str, tmp_path: Path, **env: str) -> str:
    """On a machine without any program, and so without a compiler."""
    plain = {k: v for k, v in os.environ.items() if k not in ("CXX", "CONMOE_OPERATOR")}
    done = subprocess.run(
        [sys.executable, "-c", _SAY, device],
        capture_output=True,
        text=True,
        check=True,
        env={
            **plain,
            "PYTHONPATH": str(_ROOT),
            "CXX": "none",
            "PATH": str(tmp_path),
            "XDG_CACHE_HOME": str(tmp_path),
            **env,
        },
    )
    return done.stdout.strip()


def test_the_reason_and_who_says_more(tmp_path: Path) -> None:
    text = said("cpu", tmp_path)
    assert text.count("\n") == 0 and "several times slower" in text
    assert "C++ compiler" in text and "doctor" in text


def test_nothing_is_said_on_a_gpu_or_where_it_was_switched_off(tmp_path: Path) -> None:
    assert said("cuda:0", tmp_path) == ""
    assert said("cpu", tmp_path, CONMOE_OPERATOR="off") == ""
