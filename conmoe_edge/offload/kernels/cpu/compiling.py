"""The operator's source, compiled for a target and an instruction set.

The ``ctypes`` structures (``structs.py``, ``attention_tables.py``, ``decoder_tables.py``) are the one description of
their layout: sizes and offsets go into the compiled text as static assertions, so a C++ structure that differs does not
compile. Nothing is compiled out of a model folder.

Peak memory: the compiler's, in a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from conmoe_edge.offload.kernels.cpu.compilers import Compiler
from conmoe_edge.offload.kernels.cpu.decoder_tables import STRUCTURES
from conmoe_edge.offload.kernels.cpu.targets import Target

SOURCE = Path(__file__).with_name("csrc") / "operator.cpp"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1")
_HEX = 32


def source_digest(target: Target, flags: Sequence[str]) -> str:
    """Of all that a library is made from but the compiler: source, layout of the structures, target and ``flags``."""
    parts = (target.name, *target.compile_flags, *target.link_flags, *flags, assertions())
    digest = hashlib.sha256("\0".join(parts).encode())
    for one in sorted([SOURCE, *SOURCE.parent.glob("*.h")]):
        digest.update(f"\0{one.name}\0".encode())
        # As git may have written it: lines end otherwise on Windows, and mean the same.
        digest.update(one.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:_HEX]


def compile_library(compiler: Compiler, target: Target, flags: Sequence[str], built: Path) -> None:
    """Write the library for ``target`` to ``built``; ``flags`` name the instruction set, and sanitizers.

    Raises:
        Unavailable: the compiler fails or takes too long.
        OSError: there is no room beside ``built``.
    """
    zig = compiler.kind == "zig"
    where = ("-target", target.triple) if zig else ()
    sanitizers = [one for one in flags if one in SANITIZERS]
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        text, code = Path(folder) / "checked.cpp", Path(folder) / "operator.o"
        text.write_text(assertions(), "utf-8")
        options = compiler.flags([*where, *target.compile_flags, *flags])
        compiler.run([*options, "-include", str(SOURCE), "-c", str(text), "-o", str(code)])
        # The instruction set is not named here: zig would build its C++ library for each anew.
        linking = [*where, *target.link_flags, *sanitizers]
        if zig:
            linking.append("-O3")
        if not sanitizers and (zig or target.system != "macos"):
            linking.append("-s")  # without the names of insides
        if target.system == "linux":
            names = Path(folder) / "names"
            names.write_text("{ global: conmoe_*; local: *; };\n", "utf-8")
            linking.append(f"-Wl,--version-script={names}")
        compiler.run([*linking, str(code), "-o", str(built)])


def assertions() -> str:
    """C++: the size of every structure, and the place and size of each of its fields."""
    lines = []
    for structure in STRUCTURES:
        name = structure.__name__.lstrip("_")
        lines.append(f"sizeof({name}) == {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            at = getattr(structure, field)
            lines.append(f"offsetof({name}, {field}) == {at.offset}")
            lines.append(f"sizeof({name}::{field}) == {at.size}")
    return "".join(f'static_assert({one}, "as in the tables in Python");\n' for one in lines)
