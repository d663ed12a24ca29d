"""Nothing is open or mapped when it is renamed, replaced or deleted: Windows refuses that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.cli.main import main

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="open files are read from /proc"
)


def held(place: Path) -> list[str]:
    """Files at or below ``place`` that this process has open or mapped."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except OSError:
            continue  # that of the listing itself
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        found.append(line.partition("/")[2] and "/" + line.partition("/")[2])
    return [one for one in found if one == str(place) or one.startswith(f"{place}/")]


def test_a_fit_in_the_place_of_a_package(
    model: Path, text: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(package, out)
    seen: list[tuple[str, str]] = []
    open_then: list[str] = []

    def watched(name: str) -> None:
        right = getattr(durable, name)

        def act(*places: Path) -> None:
            seen.append((name, places[-1].name))
            for place in places:
                open_then.extend(held(place))
            right(*places)

        monkeypatch.setattr(durable, name, act)

    watched("replace")
    watched("remove_tree")
    words = ("--gpu", "900MB", "--device", "cpu", "--rate", "50%", "--method", "reap")
    more = ("--calibration", str(text), "--calibration-tokens", "512", "--overwrite", "--offline")
    done = CliRunner().invoke(
        main, ["fit", str(model), "--out", str(out), *words, *more, "--quiet"]
    )
    assert done.exit_code == 0, done.output
    assert open_then == []
    assert ("replace", "out") in seen and {"remove_tree"} & {name for name, _ in seen}


def test_a_file_that_is_open_is_seen(tmp_path: Path) -> None:
    place = tmp_path / "a"
    with place.open("wb"):
        assert held(tmp_path) == [str(place)] == held(place)
    assert held(tmp_path) == []
