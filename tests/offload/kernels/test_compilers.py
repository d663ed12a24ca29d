"""Which compilers there are, what they are told, and what becomes of one that hangs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conmoe_edge.offload.kernels.cpu import build, compilers, targets
from conmoe_edge.offload.kernels.cpu.compilers import Compiler, zig_flag
from conmoe_edge.offload.kernels.cpu.levels import levels_of
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable
from tests.patience import wait_for

posix = pytest.mark.skipif(os.name != "posix", reason="programs in the shell's language")


def program(path: Path, version: str) -> None:
    path.write_text(f'#!/bin/sh\necho "{version}"\necho "and more"\n')
    path.chmod(0o755)


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any compiler; a folder on its path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilers, "zig", lambda: None)
    return tmp_path


@posix
def test_those_of_the_system_in_their_order_then_that_of_pip(
    nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(nothing / "clang++", "Debian clang version 14.0.6")
    program(nothing / "g++", "g++ (Debian) 12.2.0")
    pip = Compiler(("zig", "c++"), "ziglang 0.17.1", "zig")
    monkeypatch.setattr(compilers, "zig", lambda: pip)
    found = list(compilers.compilers())
    assert [(one.name, one.version, one.kind) for one in found] == [
        ("g++", "g++ (Debian) 12.2.0", "gcc"),
        ("clang++", "Debian clang version 14.0.6", "clang"),
        ("ziglang", "ziglang 0.17.1", "zig"),
    ]


@posix
def test_what_cxx_names_is_the_only_one(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(nothing / "g++", "g++ (Debian) 12.2.0")
    program(nothing / "mine", "my own clang version 3")
    monkeypatch.setenv("CXX", "mine -stdlib=libc++")
    (found,) = compilers.compilers()
    assert found.command == (str(nothing / "mine"), "-stdlib=libc++") and found.kind == "clang"
    monkeypatch.setenv("CXX", "another -m64")
    with pytest.raises(Unavailable, match=r"CXX names no C\+\+ compiler: another -m64"):
        list(compilers.compilers())


@posix
def test_one_that_does_not_run_is_passed_over(nothing: Path) -> None:
    (nothing / "g++").write_text("#!/bin/sh\nexit 1\n")
    (nothing / "g++").chmod(0o755)
    program(nothing / "c++", "c++ 9")
    assert [one.name for one in compilers.compilers()] == ["c++"]


def test_without_any_the_reason_says_how_one_comes(
    nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(nothing))
    monkeypatch.setattr(build, "SHIPPED", nothing / "no wheel")
    for ask in (build.library, build.is_built):
        with pytest.raises(Unavailable, match=r"no C\+\+ compiler \(.*pip install"):
            ask()


@pytest.mark.parametrize(
    ("flag", "its"),
    [
        ("-march=x86-64-v3", "-mcpu=x86_64_v3"),
        ("-march=armv8-a", "-mcpu=generic+v8a"),
        ("-march=armv8.2-a+dotprod", "-mcpu=generic+v8_2a+dotprod"),
        ("-mavx512vnni", "-mavx512vnni"),
        ("-O3", "-O3"),
    ],
)
def test_names_of_processors(flag: str, its: str) -> None:
    assert zig_flag(flag) == its


def test_the_compiler_of_pip_takes_the_flags_of_every_level(tmp_path: Path) -> None:
    """Compiled for each: a text that is wrong where the instructions are not there."""
    found = compilers.zig()
    if found is None:
        pytest.skip("ziglang is not installed")
    marks = {
        "avx512-vnni": "__AVX512VNNI__",
        "avx512": "__AVX512BW__",
        "avx-vnni": "__AVXVNNI__",
        "avx2": "__AVX2__",
        "dotprod": "__ARM_FEATURE_DOTPROD",
        "neon": "__ARM_NEON",
        "plain": "__SSE2__",
    }
    for target in (targets.WHEELS["linux-x86_64"], targets.WHEELS["linux-aarch64"]):
        for level in levels_of(target.machine):
            text = tmp_path / "text.cpp"
            text.write_text(f"#ifndef {marks[level.name]}\n#error {level.name}\n#endif\n")
            flags = ["-target", target.triple, *target.compile_flags, *level.flags]
            found.run([*found.flags(flags), "-c", str(text), "-o", str(tmp_path / "code.o")])


@posix
def test_a_compiler_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    slow, child = tmp_path / "slow", tmp_path / "child"
    slow.write_text(f'#!/bin/sh\nsleep 600 &\necho $! > "{child}"\nwait\n')
    slow.chmod(0o755)
    seconds = 0.5
    while not child.exists() or not child.read_text():  # the shell itself may take as long
        seconds *= 2
        with pytest.raises(Unavailable, match=f"slow took longer than {seconds:g} s"):
            compilers.run([str(slow)], seconds, "slow")
    status = Path(f"/proc/{child.read_text().strip()}/status")
    # it is gone, or waits to be collected
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text())
