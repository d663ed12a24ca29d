"""Consoles that do not speak UTF-8: Windows' code pages, and ASCII as under ``LC_ALL=C`` in a container."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conmoe_edge.cli.ui.output import Output
from conmoe_edge.cli.ui.text import to_encoding

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.slow)])
def test_the_main_commands(encoding: str, model: Path, package: Path, tmp_path: Path) -> None:
    folders = [str(ROOT), str(ROOT / "tests" / "cli")]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "PYTHONUTF8": "0",
        "PYTHONPATH": os.pathsep.join(folders),
        "CONMOE_DATA_DIR": str(tmp_path / "data"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "consoles", str(model), str(package), str(tmp_path)],
        capture_output=True,
        env=environment,
        check=False,
    )
    out, error = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 0, error[-2000:]
    assert "UnicodeEncodeError" not in error
    for text in (out, error):
        said = [line for line in text.splitlines() if "?" in line]
        # A question mark for a symbol stands alone or between figures; in words it ends a question.
        assert [line for line in said if " ? " in line or "??" in line] == [], said
    assert "out" in {one.name for one in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("cp1252", "> 64-8 café"), ("cp437", "> 64-8 café"), ("ascii", "> 64-8 caf?")],
)
def test_letters_stay_where_the_console_has_them(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    assert to_encoding("❯ 64–8 café", encoding) == shown
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    Output().stream("❯ 64–8 café")
    assert raw.getvalue().decode(encoding) == shown


def test_an_encoding_that_python_does_not_know_is_taken_for_ascii(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Odd(io.StringIO):
        encoding = "cp-none"  # type: ignore[assignment]

    odd = Odd()
    monkeypatch.setattr(sys, "stdout", odd)
    Output().stream("é ❯")
    assert odd.getvalue() == "? >"
