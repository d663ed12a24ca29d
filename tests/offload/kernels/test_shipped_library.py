"""A library that came with the wheel: used before anything is compiled, and only if it is of this source."""

from __future__ import annotations

from pathlib import Path

import pytest

from conmoe_edge.offload.kernels.cpu import build, compiling, tried_apart
from conmoe_edge.offload.kernels.cpu.compilers import Compiler
from conmoe_edge.offload.kernels.cpu.library_files import put_library
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

CONTENT = b"a library"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of this machine's best level, in a wheel of this source; nothing in the cache. Tests of libraries say yes."""
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.delenv(build.SANITIZE, raising=False)
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SHIPPED", folder)
    monkeypatch.setattr(tried_apart, "self_test", lambda *_: "")
    monkeypatch.setattr(build, "compilers", lambda: iter(()))
    return put(folder)


def put(folder: Path) -> Path:
    wanted = build._Wanted.here()
    key = build.shipped_key(wanted.target, wanted.level, wanted.flags)
    built = folder / "built"
    built.write_bytes(CONTENT)
    return put_library(built, folder, key, wanted.target.suffix)


def refused() -> bool:
    try:
        build.library()
    except Unavailable as error:
        return "no C++ compiler" in str(error)
    return False


def test_it_is_used_without_a_compiler(shipped: Path) -> None:
    assert not build.is_built()  # its test takes a moment
    found = build.found_library()
    assert (found.path, found.made_by) == (shipped, "came with the wheel")
    assert found.level == build.best_level().name and build.is_built()


def test_one_of_another_source_is_not_used(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "csrc" / "operator.cpp"
    source.parent.mkdir()
    for one in compiling.SOURCE.parent.iterdir():
        (source.parent / one.name).write_bytes(one.read_bytes())
    monkeypatch.setattr(compiling, "SOURCE", source)
    assert build.library() == shipped
    header = source.with_name("lanes.h")
    text = header.read_bytes()
    header.write_bytes(text.replace(b"\n", b"\r\n"))  # as git may write it on Windows
    assert build.library() == shipped
    header.write_bytes(text + b"\n// changed\n")
    assert refused()


def test_one_for_other_structures_is_not_used(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "STRUCTURES", compiling.STRUCTURES[1:])
    assert refused()


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT + b"!"])
def test_a_damaged_one_is_not_used_and_not_touched(shipped: Path, damage: bytes) -> None:
    shipped.write_bytes(damage)
    assert refused() and shipped.read_bytes() == damage


def test_it_is_used_where_the_cache_cannot_be(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert build.library() == shipped


def test_after_one_that_crashes_a_compiler_is_asked(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tested(path: Path, _: int) -> str:
        return "it crashes" if path == shipped else ""

    monkeypatch.setattr(tried_apart, "self_test", tested)
    with pytest.raises(Unavailable, match="it crashes"):
        build.library()
    compiler = Compiler(("g++",), "g++ 12", "gcc")
    monkeypatch.setattr(build, "compilers", lambda: iter((compiler,)))
    monkeypatch.setattr(build, "compile_library", lambda *given: given[-1].write_bytes(b"another"))
    found = build.found_library()
    assert found.made_by == "g++ 12" and found.path.read_bytes() == b"another"
