"""GGUF by llama.cpp's own converter: a plain checkpoint beside the file, ``convert_hf_to_gguf.py`` over it, gone again.

The converter is a program of its own with requirements of its own; it is found, never brought along, and run with a
plain list of arguments. The file appears under its name only when it is whole. Disk beside the file: the plain
checkpoint. Raises ``UsageError`` where the converter is not found or is no such script, ``ConversionError`` with the
converter's last words where it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conmoe_edge.checkpoint.format.manifest import UNCHANGED
from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.checkpoint.fs.atomic_files import temporary_name
from conmoe_edge.checkpoint.fs.disk import disk_errors
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.compress.run.job import Progress
from conmoe_edge.errors import ConmoeError, OutputExists, UsageError
from conmoe_edge.export.hf import Exported, OnProgress, export_hf

SCRIPT = "convert_hf_to_gguf.py"
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""Number formats that the converter writes; smaller ones are llama-quantize's business."""

_CLONE = "git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install -r llama.cpp/requirements.txt"
_LAST_LINES = 4


class ConversionError(ConmoeError):
    """llama.cpp's converter ended with an error."""


def find_converter(llama_cpp: Path | None) -> Path:
    """The converter: in the folder given (or the file itself), else in a folder on ``PATH``.

    Raises:
        UsageError: it is not there.
    """
    if llama_cpp is not None:
        script = llama_cpp if llama_cpp.name == SCRIPT else llama_cpp / SCRIPT
        if script.is_file():
            return script.resolve()
        raise UsageError(
            f"{llama_cpp} has no {SCRIPT}.",
            "GGUF is written by llama.cpp's own converter",
            f"--llama-cpp FOLDER of a clone of llama.cpp: {_CLONE}",
        )
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        script = Path(folder or ".") / SCRIPT
        if script.is_file():
            return script.resolve()
    raise UsageError(
        f"{SCRIPT} was not found.",
        "GGUF is written by llama.cpp's own converter, and no folder on PATH has it",
        f"{_CLONE}; then the same command with --llama-cpp llama.cpp",
    )


def converter_arguments(
    script: Path, model: Path, out: Path, outtype: str, python: Path | None = None
) -> list[str]:
    """The command line of the converter."""
    interpreter = sys.executable if python is None else str(python)
    return [interpreter, str(script), str(model), "--outfile", str(out), "--outtype", outtype]


def export_gguf(
    package: Path,
    out: Path,
    *,
    llama_cpp: Path | None = None,
    python: Path | None = None,
    outtype: str = "auto",
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> Exported:
    """Write the package in ``package`` as the GGUF file ``out``.

    Args:
        package: a folder that ``fit`` wrote.
        out: the file.
        llama_cpp: a clone of llama.cpp, or its converter; by default it is looked for on ``PATH``.
        python: the interpreter that has the converter's requirements; by default this one.
        outtype: number format of the file, one of ``OUTTYPES``.
        overwrite: replace an existing file.
        progress: called after every layer of the checkpoint.
    """
    tell = progress or (lambda step: None)
    script = find_converter(llama_cpp)
    if out.is_dir():
        raise UsageError(f"{out} is a folder.", "GGUF is one file", f"{out}/model.gguf, say")
    if out.exists() and not overwrite:
        raise OutputExists(
            f"{out} exists already.", "", "--overwrite to replace it, or another name"
        )
    # The converter is another program that opens what it finds in a folder.
    unchanged = open_package(package).manifest.method == UNCHANGED
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work,
            temporary_name(out) as part,
        ):
            model = package
            done = Exported(out, "unchanged", 0, 0, 0, ())
            if not unchanged:
                model = Path(work) / "model"
                done = export_hf(package, model, progress=progress)
            tell(Progress("convert", 0, 1, SCRIPT))
            _run(converter_arguments(script, model, part, outtype, python), python)
            if not part.is_file():
                raise ConversionError(
                    f"{SCRIPT} ended without an error, but there is no file.", "", str(script)
                )
            durable.fsync_file(part)
            durable.replace(part, out)
    tell(Progress("convert", 1, 1, SCRIPT))
    return replace(done, folder=out, nbytes=out.stat().st_size)


def _run(arguments: Sequence[str], python: Path | None) -> None:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UsageError(
            f"{arguments[0]} cannot be run.",
            error.strerror or str(error),
            "--converter-python with the interpreter that has the converter's requirements",
        ) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        last = lines[-_LAST_LINES:] if lines else [f"exit status {done.returncode}"]
        missing = any("ModuleNotFoundError" in line for line in last)
        raise ConversionError(
            f"llama.cpp's converter ended with status {done.returncode}.",
            "it says: " + " ".join(last)[-300:],
            "--converter-python with the interpreter that has the converter's requirements"
            if missing
            else f"to see all of it: {' '.join(arguments)}",
        )
