"""Wheels with libraries: their tags, what the libraries need of a system, and one used without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from conmoe_edge.offload.kernels.cpu.compilers import Compiler
from conmoe_edge.offload.kernels.cpu.levels import best_level, levels_of
from conmoe_edge.offload.kernels.cpu.library_files import content_digest
from conmoe_edge.offload.kernels.cpu.targets import WHEELS, here
from tools.platform_wheels import packed, staged_libraries

pytestmark = [pytest.mark.platforms, pytest.mark.timeout(7200)]
INSIDE = "conmoe_edge/offload/kernels/cpu/lib/"
ELSEWHERE = re.compile(
    # libc and the loader; the C runtime that is part of Windows 10; the one library of macOS
    r"lib(c|m|dl|pthread)\.so\.\d|ld-linux-(x86-64|aarch64)\.so\.\d"
    r"|KERNEL32\.dll|api-ms-win-crt-[a-z]+-l1-1-0\.dll|/usr/lib/libSystem\.B\.dylib",
    re.IGNORECASE,
)
NEWEST_GLIBC = (2, 28)


def wheel_of(name: str, compiler: Compiler, folder: Path) -> Path:
    staged_libraries(compiler, WHEELS[name])
    return packed(name, folder)


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(f"{name}-14")
    if found is None:
        pytest.skip(f"no {name} here")
    return found


@pytest.mark.parametrize("name", WHEELS)
def test_a_wheel_says_its_system_and_has_all_levels(
    name: str, compiler: Compiler, tmp_path: Path
) -> None:
    wheel = wheel_of(name, compiler, tmp_path)
    assert wheel.name.endswith(f"-py3-none-{WHEELS[name].tag}.whl")
    with zipfile.ZipFile(wheel) as file:
        inside = [one for one in file.namelist() if one.startswith(INSIDE)]
        (record,) = (one for one in file.namelist() if one.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in file.read(record).decode()
        file.extractall(tmp_path, inside)
    levels = {one.name for one in levels_of(WHEELS[name].machine)}
    found = [tmp_path / one for one in inside]
    assert {one.name.rsplit("-", 2)[0] for one in found} == levels and len(found) == len(levels)
    for one in found:
        assert one.suffix == WHEELS[name].suffix and one.stem.endswith(content_digest(one))
    print(f"\n{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, " + ", ".join(sizes(found)))


def sizes(libraries: list[Path]) -> list[str]:
    return [f"{one.name.rsplit('-', 2)[0]} {one.stat().st_size / 1e6:.2f}" for one in libraries]


@pytest.mark.parametrize("name", WHEELS)
def test_a_library_asks_for_nothing_but_the_system(name: str, compiler: Compiler) -> None:
    for library in staged_libraries(compiler, WHEELS[name]).values():
        needed = needs(library)
        assert needed and all(ELSEWHERE.fullmatch(one) for one in needed), (library, needed)


def needs(library: Path) -> set[str]:
    """The libraries that one asks for."""
    if library.suffix == ".dylib":
        said = output([tool("llvm-objdump"), "--macho", "--dylibs-used", str(library)])
        return {
            line.split()[0] for line in said.splitlines()[2:]
        }  # behind the file and its own name
    if library.suffix == ".dll":
        said = output([tool("llvm-readobj"), "--coff-imports", str(library)])
        return set(re.findall(r"^  Name: (\S+)", said, re.MULTILINE))
    said = output([tool("llvm-readobj"), "--needed-libs", str(library)])
    return set(re.findall(r"^  (\S+\.so\S*)", said, re.MULTILINE))


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", [one for one in WHEELS if one.startswith("linux")])
def test_a_library_runs_with_the_glibc_that_its_tag_says(name: str, compiler: Compiler) -> None:
    for library in staged_libraries(compiler, WHEELS[name]).values():
        said = output([tool("llvm-readobj"), "--version-info", str(library)])
        versions = {tuple(map(int, one)) for one in re.findall(r"GLIBC_(\d+)\.(\d+)", said)}
        assert versions and max(versions) <= NEWEST_GLIBC


@pytest.mark.parametrize("name", WHEELS)
def test_what_python_calls_is_there_and_on_linux_nothing_else(
    name: str, compiler: Compiler
) -> None:
    from conmoe_edge.offload.kernels.cpu.operator import _FUNCTIONS

    wanted = {"conmoe_level", *(f"conmoe_{one}" for one in _FUNCTIONS)}
    for library in staged_libraries(compiler, WHEELS[name]).values():
        found = exported(library)
        assert wanted <= found
        assert not name.startswith("linux") or found == wanted


def exported(library: Path) -> set[str]:
    if library.suffix == ".dll":
        said = output([tool("llvm-readobj"), "--coff-exports", str(library)])
        return set(re.findall(r"Name: (\w+)", said))
    dynamic = ["-D"] if library.suffix == ".so" else []
    said = output([tool("llvm-nm"), *dynamic, "--defined-only", "--extern-only", str(library)])
    names = {line.split()[-1] for line in said.splitlines() if line.strip()}
    return {one.removeprefix("_") for one in names} if library.suffix == ".dylib" else names


def test_the_plain_wheel_is_for_every_system(tmp_path: Path) -> None:
    wheel = packed("", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        assert not [one for one in file.namelist() if one.startswith(INSIDE)]
        assert INSIDE.replace("lib/", "csrc/operator.cpp") in file.namelist()


SAY = """
import json
import torch
from conmoe_edge.offload.kernels.cpu.bindings import operator, operator_library, why_not
from conmoe_edge.offload.kernels.cpu.compilers import compilers
found, made = operator_library(), operator()
try:
    there = [one.name for one in compilers()]
except Exception as error:
    there = []
print(json.dumps({
    "why": why_not(), "path": found and str(found.path), "level": found and found.level,
    "made_by": found and found.made_by, "operator": made and made.name, "compilers": there,
}))
"""


def test_a_wheel_without_a_compiler_has_the_best_operator(
    compiler: Compiler, tmp_path: Path
) -> None:
    """In an environment of its own, with no program on the path; torch and the like come from this one's."""
    name = here().name
    if name not in WHEELS:
        pytest.skip(f"no wheel is made for {name}")
    wheel = wheel_of(name, compiler, tmp_path)
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = home / scripts / Path(sys.executable).name
    packages = Path(
        output([str(python), "-c", "import site; print(site.getsitepackages()[-1])"]).strip()
    )
    install = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*install, "--no-deps", "--target", str(packages), str(wheel)], check=True)
    others = [one for one in sys.path if Path(one).name.endswith("-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {
        **os.environ,
        "PATH": str(empty),
        "CXX": "none",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    for gone in ("PYTHONPATH", "CONMOE_OPERATOR", "CONMOE_OPERATOR_LEVEL"):
        env.pop(gone, None)
    done = subprocess.run(
        [str(python), "-c", SAY], cwd=empty, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    print(f"\n{said}")
    assert said["why"] == "" and said["compilers"] == []
    assert Path(said["path"]).is_relative_to(packages)
    assert (said["level"], said["made_by"]) == (best_level().name, "came with the wheel")
    assert not list((tmp_path / "cache").rglob(f"*{WHEELS[name].suffix}"))
