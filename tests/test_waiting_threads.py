"""Threads of torch's OpenMP stay awake for a bounded time, unless somebody said otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conmoe_edge.waiting_threads import POLICY_VARIABLE, SPIN_VARIABLE, TURNS

_ROOT = Path(__file__).resolve().parents[1]
_SAY = (
    "import json, os; import conmoe_edge; from conmoe_edge.api.diagnosing import waiting_finding; "
    f"print(json.dumps([os.environ.get({SPIN_VARIABLE!r}), waiting_finding().status, waiting_finding().text]))"
)


def said(code: str, **env: str) -> tuple[str | None, str, str]:
    """The variable, and what ``doctor`` says, in a fresh process."""
    plain = {k: v for k, v in os.environ.items() if k not in (POLICY_VARIABLE, SPIN_VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**plain, "PYTHONPATH": str(_ROOT), **env},
    )
    turns, status, text = json.loads(done.stdout.splitlines()[-1])
    return turns, status, text


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp's variable")


@linux
@pytest.mark.parametrize(
    ("first", "env", "turns", "status", "word"),
    [
        ("", {}, str(TURNS), "ok", f"{TURNS} turns"),
        ("", {SPIN_VARIABLE: str(TURNS)}, str(TURNS), "ok", f"{TURNS} turns"),
        ("", {POLICY_VARIABLE: "PASSIVE"}, None, "info", f"{POLICY_VARIABLE}=PASSIVE"),
        ("", {SPIN_VARIABLE: "7"}, "7", "info", f"{SPIN_VARIABLE}=7"),
        ("import torch; ", {}, None, "warn", "torch was imported before"),
        ("import torch; ", {POLICY_VARIABLE: "ACTIVE"}, None, "info", "ACTIVE"),
    ],
    ids=["bounded", "child", "passive", "own", "late", "late-said"],
)
def test_who_decides(
    first: str, env: dict[str, str], turns: str | None, status: str, word: str
) -> None:
    found = said(first + _SAY, **env)
    assert found[:2] == (turns, status)
    assert word in found[2]


@linux
def test_libgomp_takes_it() -> None:
    """What libgomp itself says of its settings when it is loaded with torch."""
    plain = {k: v for k, v in os.environ.items() if k not in (POLICY_VARIABLE, SPIN_VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", "import conmoe_edge, torch; torch.ones(2).sum()"],
        capture_output=True,
        text=True,
        check=True,
        env={**plain, "PYTHONPATH": str(_ROOT), "OMP_DISPLAY_ENV": "VERBOSE"},
    )
    assert f"GOMP_SPINCOUNT = '{TURNS}'" in done.stderr
