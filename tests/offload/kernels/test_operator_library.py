"""The compiled library: what is opened, what is built anew, what is refused, and the check of a fresh one."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.offload.kernels.cpu import (
    attention_tables,
    bindings,
    build,
    compiling,
    decoder_tables,
    levels,
    structs,
    targets,
    tried_apart,
)
from conmoe_edge.offload.kernels.cpu.compilers import Compiler, compilers
from conmoe_edge.offload.kernels.cpu.library_files import put_library
from conmoe_edge.offload.kernels.cpu.operator import _FUNCTIONS, Operator
from conmoe_edge.offload.kernels.cpu.self_test import check
from conmoe_edge.offload.kernels.cpu.targets import Target
from conmoe_edge.offload.kernels.cpu.tried_apart import told_of
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

try:
    BUILT = build.library()
except Unavailable as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a library in it; the file's path."""
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "no wheel")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "conmoe-edge" / "operator"
    folder.mkdir(parents=True, mode=0o700)
    (compiler, *_) = compilers()
    path = put(BUILT.read_bytes(), build._Wanted.here()._key(compiler), folder)
    told = told_of(path, folder)
    told.write_text("")
    told.chmod(0o600)
    return path


def put(content: bytes, key: str, folder: Path) -> Path:
    """A library of any content, under the name that one of this key would have."""
    built = folder / "new"
    built.write_bytes(content)
    return put_library(built, folder, key, BUILT.suffix)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compilers that were asked. What they give is there already, and it takes long."""
    calls: list[str] = []

    def counted(compiler: Compiler, target: Target, flags: object, built: Path) -> None:
        calls.append(compiler.name)
        built.write_bytes(BUILT.read_bytes())

    monkeypatch.setattr(build, "compile_library", counted)
    return calls


def test_a_whole_library_is_opened_as_it_is(cache: Path, compiled: list[str]) -> None:
    assert build.library() == cache and build.is_built()
    assert not compiled


def test_no_more_compilers_are_asked_than_it_takes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(build.compilers())

    def one_alone() -> Iterator[Compiler]:
        yield first
        pytest.fail("the library of the first one is there")

    monkeypatch.setattr(build, "compilers", one_alone)
    assert build.is_built() and build.library() == cache


@pytest.mark.parametrize("damage", ["cut off", "changed", "empty"])
def test_a_damaged_library_is_built_once(cache: Path, compiled: list[str], damage: str) -> None:
    content = bytearray(cache.read_bytes())
    if damage == "cut off":
        content = content[: len(content) // 2]
    elif damage == "changed":
        content[len(content) // 3] ^= 1
    else:
        content = bytearray()
    cache.write_bytes(content)
    assert build.library() == cache and len(compiled) == 1
    check(Operator(ctypes.CDLL(str(cache))))
    assert build.library() == cache and len(compiled) == 1


@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_a_folder_that_others_can_write_is_closed_and_what_lay_there_is_built_again(
    cache: Path, compiled: list[str], bit: int
) -> None:
    cache.parent.chmod(cache.parent.stat().st_mode | bit)
    assert build.library() == cache and len(compiled) == 1
    assert cache.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_a_file_that_others_can_write_is_built_again(
    cache: Path, compiled: list[str], bit: int
) -> None:
    cache.chmod(cache.stat().st_mode | bit)
    assert build.library() == cache and len(compiled) == 1
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_link_is_built_again_and_not_followed(
    cache: Path, compiled: list[str], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.so"
    cache.rename(elsewhere)
    cache.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert build.library() == cache and len(compiled) == 1
    assert not cache.is_symlink() and elsewhere.read_bytes() == before


as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files to other users"
)
NOBODY = 65534


@as_root
def test_a_file_of_another_user_is_built_again(cache: Path, compiled: list[str]) -> None:
    os.chown(cache, NOBODY, NOBODY)
    assert build.library() == cache and len(compiled) == 1
    assert cache.stat().st_uid == os.geteuid()


@as_root
@pytest.mark.parametrize("above", [False, True], ids=["folder", "the folder above"])
def test_a_folder_of_another_user_is_refused(cache: Path, compiled: list[str], above: bool) -> None:
    os.chown(cache.parent.parent if above else cache.parent, NOBODY, NOBODY)
    with pytest.raises(Unavailable, match="belongs to another user"):
        build.library()
    assert not compiled


def test_what_root_owns_is_opened(
    cache: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an administrator has built it for everybody."""
    owner = cache.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        assert build.library() == cache and not compiled
    else:
        with pytest.raises(Unavailable, match="belongs to another user"):
            build.library()


def test_a_library_is_written_for_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a compiler, without optimisation, which takes seconds."""
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "no wheel")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(levels.FORCED, levels.levels_here()[-1].name)
    monkeypatch.setattr(targets, "COMMON", ("-std=c++17", "-O0", "-w"))
    before = os.umask(0)
    try:
        path = build.library()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    assert told_of(path, path.parent).read_text() == ""
    check(Operator(ctypes.CDLL(str(path))))


def test_a_structure_that_c_has_otherwise_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class _Norm(ctypes.Structure):
        _fields_ = [("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float)]

    monkeypatch.setattr(build, "SHIPPED", tmp_path / "no wheel")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", next(compilers()).command[0])  # that one alone
    monkeypatch.setattr(compiling, "STRUCTURES", (*decoder_tables.STRUCTURES, _Norm))
    with pytest.raises(Unavailable, match=r"failed: .*static assertion"):
        build.library()


def test_every_structure_is_compared() -> None:
    tables = (structs, attention_tables, decoder_tables)
    own = {one for module in tables for one in vars(module).values() if isinstance(one, type)}
    mirrored = {one for one in own if issubclass(one, ctypes.Structure)} - {ctypes.Structure}
    assert mirrored == set(decoder_tables.STRUCTURES)


def state_with(
    monkeypatch: pytest.MonkeyPatch, library: Callable[[], Path]
) -> tuple[bindings.Operator | None, str]:
    monkeypatch.setattr(
        bindings, "found_library", lambda: bindings.Library(library(), "a level", "a compiler")
    )
    bindings._state.cache_clear()
    try:
        return bindings._state()[:2]
    finally:
        bindings._state.cache_clear()


def test_what_is_no_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "operator.so").write_bytes(b"\x7fELF but no more")
    made, reason = state_with(monkeypatch, lambda: tmp_path / "operator.so")
    assert made is None and "operator.so" in reason


def test_a_missing_function_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    made, reason = state_with(
        monkeypatch, lambda: Path(_ctypes.__file__)
    )  # a library, but another one
    assert made is None and "conmoe_few_rows" in reason


CRASHES = """
#include <csignal>
extern "C" { const char* conmoe_level() { return "plain"; } %s }
"""


def rebuilt_as(path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of another text under the key of the operator's, as a compiler that has gone wrong would leave it, and
    no other compiler.
    """
    (compiler, *_) = compilers()
    monkeypatch.setenv("CXX", compiler.command[0])
    text, built = path.parent / "other.cpp", path.parent / "other.built"
    text.write_text(source)
    compiler.run(["-shared", "-fPIC", str(text), "-o", str(built)])
    path.unlink()
    return put(built.read_bytes(), path.stem.rpartition("-")[0], path.parent)


@pytest.mark.skipif(
    os.environ.get(build.SANITIZE) == "1", reason="a sanitizer makes an exit of the signal"
)
def test_a_library_that_crashes_does_so_once_and_elsewhere(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = " ".join(f"int conmoe_{name}() {{ return std::raise(SIGSEGV); }}" for name in _FUNCTIONS)
    path = rebuilt_as(cache, CRASHES % body, monkeypatch)
    with pytest.raises(Unavailable, match=r"crashes \(signal 11\)"):
        build.library()
    tries: list[Path] = []
    monkeypatch.setattr(tried_apart, "self_test", lambda path, _: tries.append(path) or "")
    told = told_of(path, path.parent)
    with pytest.raises(Unavailable, match=r"crashes \(signal 11\) \(remove ") as again:
        build.library()
    assert not tries and str(told) in str(again.value)
    made, reason = state_of(monkeypatch)
    assert made is None and "crashes" in reason
    told.unlink()
    assert build.library() == path and tries == [path]


def test_after_a_library_that_is_wrong_another_compiler_is_asked(
    cache: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = " ".join(f"long conmoe_{name}() {{ return 0; }}" for name in _FUNCTIONS)
    rebuilt_as(cache, CRASHES % body, monkeypatch)
    first = Compiler(next(compilers()).command, next(compilers()).version, "gcc")
    other = Compiler(("another",), "another compiler", "gcc")
    monkeypatch.setattr(build, "compilers", lambda: iter((first, other)))
    found = build.found_library()
    assert found.made_by == "another compiler" and compiled == ["another"]


def test_a_library_that_computes_nothing_is_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = " ".join(f"long conmoe_{name}() {{ return 0; }}" for name in _FUNCTIONS)
    rebuilt_as(cache, CRASHES % body, monkeypatch)
    for _ in range(2):
        with pytest.raises(Unavailable, match="wrongly"):
            build.library()


def test_a_library_without_a_function_is_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuilt_as(cache, CRASHES % "int conmoe_few_rows() { return 0; }", monkeypatch)
    for _ in range(2):
        with pytest.raises(Unavailable, match="conmoe_"):
            build.library()


def test_modules_of_the_folder_in_which_it_runs_are_not_imported(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "ctypes.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(here)
    told = told_of(cache, cache.parent)
    told.unlink()
    assert build.library() == cache
    assert told.is_file() and not (tmp_path / "ran").exists()


def state_of(monkeypatch: pytest.MonkeyPatch) -> tuple[bindings.Operator | None, str]:
    return state_with(monkeypatch, build.library)


FUNCTIONS = sorted(set(_FUNCTIONS) - {"byte_products"})  # that measures, and has no results


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_computes_something_else_is_found(name: str) -> None:
    """Each function in turn leaves its results as they were, or says that it has failed."""
    made = Operator(ctypes.CDLL(str(build.library())))
    attribute = {"gated_experts": "_gated", "rms_norm": "_norm"}.get(name, f"_{name}")
    assert hasattr(made, attribute)
    check(made)
    setattr(made, attribute, lambda *_: 0)
    with pytest.raises(Unavailable, match="operator"):
        check(made)


def test_the_check_is_quick() -> None:
    made = Operator(ctypes.CDLL(str(build.library())))
    check(made)
    start = time.process_time()
    check(made)
    assert time.process_time() - start < 0.5  # a few milliseconds; busy machines included


def wrong_calls() -> list[tuple[str, str]]:
    return [
        ("dtype", "engine.one_row(one, torch.zeros(1, 64, dtype=torch.float64))"),
        ("width", "engine.one_row(one, torch.zeros(1, 63))"),
        ("order", "engine.one_row(one, torch.zeros(1, 128)[:, ::2])"),
        ("device", "engine.one_row(one, torch.zeros(1, 64, device='meta'))"),
        ("rows", "engine.few_rows([one], torch.zeros(1, 2, 65))"),
        ("count", "engine.few_rows([one, one], torch.zeros(3, 2, 64))"),
        ("forms", "engine.few_rows([one, other], torch.zeros(1, 2, 64))"),
        ("experts", "engine.gated_experts([one], [one], torch.zeros(1, 64))"),
        ("out", "engine.expand(one, torch.zeros(64, 65))"),
        ("sum", "engine.combine(torch.zeros(2, 5), [1.0], torch.float32)"),
        ("sum dtype", "engine.combine(torch.zeros(1, 5), [1.0], torch.float16)"),
        ("norm", "engine.rms_norm(norm, torch.zeros(2, 63))"),
        ("route", "engine.route(router, torch.zeros(1, 64))"),
        ("route width", "engine.route(router, torch.zeros(1, 32, dtype=torch.bfloat16))"),
        ("query", "engine.attend(*[torch.zeros(1, 2, 1, 8)] * 3, 1.0)"),
    ]


PROLOGUE = """
import torch
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.offload.kernels.cpu.bindings import RmsNorm, RouterTable, operator
assert_is_off = __debug__ is False
engine = operator()
one = engine.prepare(quantise(torch.zeros(64, 64).bfloat16(), "plain"))
other = engine.prepare(quantise(torch.zeros(128, 64).bfloat16(), "plain"))
norm = RmsNorm(torch.ones(64), 1e-6, False, False)
router = RouterTable(one, 2, True, True)
"""


def test_wrong_tensors_are_refused_without_assertions_too() -> None:
    """In a process with ``-O``: a wrong size in front of an address must not depend on ``assert``."""
    lines = [PROLOGUE, "if not assert_is_off: raise SystemExit('no -O')"]
    for name, call in wrong_calls():
        lines += [
            "try:",
            f"    {call}",
            "except ValueError as error:",
            "    if 'does not take' not in str(error): raise",
            "else:",
            f"    raise SystemExit({name!r} + ' was taken')",
        ]
    done = subprocess.run(
        [sys.executable, "-O", "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_cache_without_room_is_refused() -> None:
    keys = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="room"):
        attention_tables.Cached.of(keys, keys, 4)
    with pytest.raises(ValueError, match="cache"):
        attention_tables.Cached.of(keys, keys.transpose(2, 3), 0)


def test_forms_with_parts_of_the_wrong_kind_are_not_prepared() -> None:
    engine = bindings.operator()
    if engine is None:
        pytest.skip(bindings.why_not())
    good = quantise(torch.randn(64, 64), "int8")
    assert good.scales is not None and engine.prepare(good) is not None
    for values, scales in (
        (good.values, good.scales.float()),
        (good.values, good.scales[:63]),
        (good.values[:63], good.scales),
        (good.values.to(torch.int16), good.scales),
    ):
        wrong = type(good)("int8", values, scales, 64, 64)
        assert engine.prepare(wrong) is None
