"""GGUF through llama.cpp's converter: how it is found, called, and what is said when it is not there or fails."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from families import save_tokenizer, tiny_model
from hand_packages import thirds, write_package

from conmoe_edge.errors import OutputExists, UsageError
from conmoe_edge.export.gguf import (
    SCRIPT,
    ConversionError,
    converter_arguments,
    export_gguf,
    find_converter,
)

# A program in the converter's place that shows what it was given; the real one needs a clone of llama.cpp.
_SHOWS = """import json, pathlib, sys
model = pathlib.Path(sys.argv[1])
seen = {"arguments": sys.argv[2:], "files": sorted(path.name for path in model.iterdir())}
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps(seen))
"""
_FAILS = "raise NotImplementedError('BPE pre-tokenizer was not recognized')\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    model = tiny_model("olmoe")
    folder = write_package(model, tmp_path / "package", thirds(model))
    save_tokenizer(folder)
    return folder


def clone(folder: Path, program: str) -> Path:
    folder.mkdir()
    (folder / SCRIPT).write_text(program)
    return folder


def test_the_arguments_are_a_plain_list() -> None:
    found = converter_arguments(Path("/l/c.py"), Path("/m; rm -rf x"), Path("/o.gguf"), "bf16")
    assert found == [
        sys.executable,
        "/l/c.py",
        "/m; rm -rf x",
        "--outfile",
        "/o.gguf",
        "--outtype",
        "bf16",
    ]


def test_it_is_found_in_the_clone_or_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = clone(tmp_path / "llama.cpp", _SHOWS)
    assert find_converter(folder) == find_converter(folder / SCRIPT) == folder / SCRIPT
    monkeypatch.setenv("PATH", os.pathsep.join(["/nowhere", str(folder)]))
    assert find_converter(None) == folder / SCRIPT


def test_where_it_is_missing_the_command_that_gets_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for given in (None, tmp_path):
        with pytest.raises(UsageError, match=SCRIPT) as caught:
            export_gguf(package, tmp_path / "out.gguf", llama_cpp=given)
        assert "git clone" in caught.value.fix and "--llama-cpp" in caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package"]


def test_it_gets_a_whole_plain_checkpoint_and_nothing_else_stays(
    tmp_path: Path, package: Path
) -> None:
    folder = clone(tmp_path / "llama.cpp", _SHOWS)
    out = tmp_path / "out.gguf"
    done = export_gguf(package, out, llama_cpp=folder, outtype="bf16")
    shown = out.read_text()
    assert '"--outtype", "bf16"' in shown and "conmoe.json" not in shown
    for name in ("config.json", "tokenizer.json", "model-00001-of-00004.safetensors"):
        assert name in shown
    assert done.nbytes == out.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama.cpp", "out.gguf", "package"]
    with pytest.raises(OutputExists):
        export_gguf(package, out, llama_cpp=folder)


def test_what_the_converter_says_last_is_passed_on(tmp_path: Path, package: Path) -> None:
    folder = clone(tmp_path / "llama.cpp", _FAILS)
    with pytest.raises(ConversionError, match="status 1") as caught:
        export_gguf(package, tmp_path / "out.gguf", llama_cpp=folder)
    assert "BPE pre-tokenizer was not recognized" in caught.value.why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.cpp", "package"]


def test_an_interpreter_that_is_not_there(tmp_path: Path, package: Path) -> None:
    folder = clone(tmp_path / "llama.cpp", _SHOWS)
    with pytest.raises(UsageError, match="cannot be run"):
        export_gguf(package, tmp_path / "o.gguf", llama_cpp=folder, python=tmp_path / "python")


def _real_converter() -> Path | None:
    given = os.environ.get("LLAMA_CPP")
    try:
        return find_converter(Path(given) if given else None)
    except UsageError:
        return None


@pytest.mark.skipif(
    _real_converter() is None,
    reason=f"{SCRIPT} is not here; set LLAMA_CPP to a clone of llama.cpp",
)
def test_the_real_converter_takes_the_demo_model(tmp_path: Path) -> None:
    """Its tensors hold the prototypes' numbers."""
    import gguf
    import numpy as np

    import conmoe_edge

    conmoe_edge.fit("demo", tmp_path / "out", budget="2GB", device="cpu", rate=0.25)
    script = _real_converter()
    export_gguf(tmp_path / "out", tmp_path / "demo.gguf", llama_cpp=script, outtype="f32")
    reader = gguf.GGUFReader(tmp_path / "demo.gguf")
    stacked = next(one for one in reader.tensors if one.name == "blk.0.ffn_down_exps.weight")
    values = np.asarray(stacked.data).reshape(stacked.shape[::-1].tolist())
    distinct = {row.tobytes() for row in values}
    assert len(values) == 32 and len(distinct) < 32
    shutil.rmtree(tmp_path / "out")
