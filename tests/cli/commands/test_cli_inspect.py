"""``inspect`` on packages that ``fit`` really made of the demo model, and on one written by hand."""

from __future__ import annotations

import json
import re
import shutil
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from families import tiny_model
from hand_packages import slots_of, write_package
from rich.console import Console

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.cli.main import main
from conmoe_edge.cli.ui.text import to_ascii
from conmoe_edge.cli.views.inspect_map import level, slot_map
from conmoe_edge.cli.views.inspect_view import inspect_view
from conmoe_edge.report.package_summary import summarise


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ("inspect", *arguments))


def fit_demo(folder: Path, *levers: str) -> Path:
    words = ("fit", "demo", "--device", "cpu", "--calibration-tokens", "2048", "--out", str(folder))
    result = CliRunner().invoke(main, (*words, *levers, "--offline", "--quiet"))
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def scoped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scoped") / "out"
    return fit_demo(out, "--gpu", "2GiB", "--rate", "50%", "--scope", "2")


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slot of every kind in each of three layers of 40."""

    def choose(layer: int, expert: int) -> SlotRecord:
        if expert == 38:
            return SlotRecord(None)
        if expert == 39:
            return SlotRecord(None, constant=0)
        return SlotRecord(ExpertId(layer, expert - expert % 2))

    import torch

    model = tiny_model("olmoe", num_experts=40, num_local_experts=40, n_routed_experts=40)
    folder = tmp_path_factory.mktemp("hand") / "package"
    ones = {layer: torch.ones(1, 32) for layer in range(3)}
    return write_package(model, folder, slots_of(model, choose), constants=ones)


def shown(folder: Path, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, markup=False, emoji=False, highlight=False)
    console.print(inspect_view(summarise(folder), width))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_everything_is_there_on_80_columns(scoped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scoped.parent)
    result = run("out")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert not [line for line in lines if len(line) > 80]
    assert "\x1b" not in result.stdout
    for words in (
        "./out · demo (olmoe) · 6 MoE layers of 32 router slots · top-4",
        "conmoe · shared by 2 layers",
        "96 of 192 experts are left",
        "same top-1",
        "96 keep their expert, 96 share another's",
        "Busiest",
        "Loneliest",
        "Distances: 1.4",
    ):
        assert words in result.stdout
    assert re.search(r"\n  experts left +96 +96\n", result.stdout)
    assert "--html report.html" in result.stderr


def test_the_map_has_a_cell_for_every_slot(scoped: Path) -> None:
    facts = summarise(scoped)
    lines = shown(scoped).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("layer  0 "))
    rows = [line for line in lines[start + 1 :] if line.strip()][:6]
    for (layer, slots), line in zip(facts.slots.items(), rows, strict=True):
        assert line[:7] == f"{layer:>5}  "
        cells = line[7:].ljust(64)
        for number, slot in enumerate(slots):
            glyph, mark = cells[2 * number : 2 * number + 2]
            assert mark == ("●" if slot.kind == "prototype" else " ")
            assert slot.relative is not None and glyph == level(slot.relative)


@pytest.mark.parametrize(
    ("relative", "glyph"), [(0, " "), (0.24, " "), (0.25, "░"), (0.5, "▒"), (1, "▓"), (2.5, "█")]
)
def test_levels(relative: float, glyph: str) -> None:
    assert level(relative) == glyph


def test_it_reads_in_ascii_as_well(scoped: Path, by_hand: Path) -> None:
    for folder in (scoped, by_hand):
        text = to_ascii(shown(folder))
        assert text.isascii() and "?" not in text
        assert "o its own expert" in text


def test_wide_layers_are_folded_and_every_kind_has_its_mark(by_hand: Path) -> None:
    text = shown(by_hand)
    assert max(map(len, text.splitlines())) <= 80
    said = "57 keep their expert, 57 share another's, 3 became constants, 3 were dropped"
    assert said in " ".join(text.split())
    assert "- a constant, x nothing, ~ another's" in text
    lines = [line for line in text.splitlines() if line.startswith("  +32  ")]
    assert [line[7:] for line in lines] == [" ● ~ ● ~ ● ~ x -"] * 3
    wide = Console(file=StringIO(), width=120, markup=False)
    wide.print(slot_map(summarise(by_hand), 120))
    assert isinstance(wide.file, StringIO) and "+32" not in wide.file.getvalue()


def test_json_has_everything_and_nothing_else_is_on_stdout(scoped: Path) -> None:
    result = run(str(scoped), "--json", "--verify")
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    manifest = load_manifest(scoped)
    assert value["schema_version"] == 1
    assert value["package"]["verified"] is True
    assert value["receipt"] == json.loads((scoped / "conmoe.json").read_text())["receipt"]
    assert len(value["prototypes"]) == len(manifest.prototypes)
    for one in value["layers"]:
        row = manifest.slots[one["layer"]]
        assert [slot["prototype"] for slot in one["slots"]] == [list(s.prototype) for s in row]
    assert value["cache"][0]["slots"][-1] == 96 and value["cache"][0]["best"][-1] == 1.0


def test_a_page_is_written(scoped: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    result = run(str(scoped), "--html", str(path))
    assert result.exit_code == 0, result.stderr
    assert str(path) in result.stderr
    text = path.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n")).tag == "html"
    quiet = run(str(scoped), "--html", str(path), "--quiet")
    assert quiet.stderr == "" and quiet.exit_code == 0
    failed = run(str(scoped), "--html", str(tmp_path / "no" / "page.html"))
    assert failed.exit_code == 1 and "Cannot write" in failed.stderr


def test_unchanged_and_measured(tmp_path: Path) -> None:
    out = fit_demo(tmp_path / "same", "--gpu", "2GiB")
    speed = tmp_path / "speed.json"
    report = {
        "package": {"method": "unchanged", "rate": 0.0, "prototypes": 0, "slots": 0},
        "decode": {"tokens_per_second": {"median": 33.25}, "hit_rate": None},
        "memory": {"used_bytes": 400 << 20, "budget_bytes": 2 << 30},
    }
    speed.write_text(json.dumps(report), encoding="utf-8")
    result = run(str(out), "--bench", str(speed), "--verify")
    assert result.exit_code == 0, result.stderr
    assert "unchanged" in result.stdout and "Every expert is as it was" in result.stdout
    assert "33.2 tok/s" in result.stdout and "400.0 MiB" in result.stdout
    assert "hashed, all as the manifest says" in result.stdout


def damaged(scoped: Path, folder: Path, what: str) -> Path:
    shutil.copytree(scoped, folder)
    if what == "missing":
        (folder / "prototypes-00002.safetensors").unlink()
    elif what == "short":
        path = folder / "prototypes-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "changed":
        path = folder / "dense-00001-of-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif what == "manifest":
        (folder / "conmoe.json").write_text("{", encoding="utf-8")
    elif what == "trace":
        path = folder / "routing.safetensors"
        path.write_bytes(b"\xff" * path.stat().st_size)
    elif what == "config":
        (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize(
    "what", ["missing", "short", "changed", "manifest", "trace", "config", "model", "empty", "none"]
)
@pytest.mark.parametrize("mode", [(), ("--json",)])
def test_bad_folders_give_one_clear_error(
    what: str, mode: tuple[str, ...], scoped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    if what == "empty":
        folder.mkdir()
    elif what == "model":
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
    elif what != "none":
        damaged(scoped, folder, what)
    result = run(str(folder), "--verify", *mode)
    assert result.exit_code == 1
    if mode:
        assert json.loads(result.stdout)["error"]["what"]
    else:
        assert result.stdout == ""
        assert "error: " in result.stderr and "  fix:  " in result.stderr
        assert "Traceback" not in result.stderr


def test_only_the_manifest_and_the_trace_are_read(scoped: Path) -> None:
    import subprocess
    import sys

    probe = (
        "import sys\nfrom conmoe_edge.cli.main import main\n"
        f"try:\n    main(['inspect', {str(scoped)!r}])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
