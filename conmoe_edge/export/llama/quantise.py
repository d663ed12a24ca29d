"""Quantised GGUF files, made by llama.cpp's own library in a process of its own.

The library is that of ``llama-cpp-python``, in this Python or in another one; it is found, never brought along. It runs
beside this process because it ends a process that it disagrees with. Memory: llama.cpp's, a tensor in fp32 and
quantised. Raises ``UsageError`` where the library is not found or cannot do what is asked, ``QuantisationFailed`` with
its last words where it fails.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np

from conmoe_edge.errors import ConmoeError, UsageError
from conmoe_edge.export.llama.importance import Importance

PACKAGE = "llama-cpp-python"
_PROGRAM = Path(__file__).with_name("quantise_program.py")
_TOO_OLD, _UNKNOWN_TYPE = 3, 4  # as in the program, which this Python need not be able to import
_LAST_LINES = 4


class QuantisationFailed(ConmoeError):
    """llama.cpp's library gave up."""


def find_llama(python: Path | None) -> Path:
    """The Python that has ``llama_cpp``: the one that was named, else this one.

    Raises:
        UsageError: it is not there.
    """
    if python is not None:
        if python.is_file():
            return python
        raise UsageError(f"{python} is no file.", "", "--llama-python with an interpreter")
    if importlib.util.find_spec("llama_cpp") is not None:
        return Path(sys.executable)
    raise UsageError(
        f"{PACKAGE} is not installed.",
        "files are quantised by llama.cpp's own library",
        f"pip install {PACKAGE}, or --llama-python FILE with a Python that has it",
    )


def quantise(
    source: Path, out: Path, kind: str, importance: Importance, *, python: Path, threads: int
) -> None:
    """Write ``source`` quantised as ``out``; not synced.

    Args:
        source: a GGUF file in a floating-point format.
        out: the file to write.
        kind: one of ``plan.gguf_types.FILE_TYPES``.
        importance: of its matrices; empty for none.
        python: as ``find_llama`` gives it.
        threads: how many compute.
    """
    weighed: Path | None = None
    if importance:
        weighed = source.with_name("importance.npz")
        np.savez(weighed, **importance)  # pyright: ignore[reportArgumentType]
    job = {
        "source": str(source),
        "out": str(out),
        "type": kind,
        "threads": threads,
        "importance": None if weighed is None else str(weighed),
    }
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [str(python), str(_PROGRAM)],
            input=json.dumps(job),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=own,
        )
    except OSError as error:
        raise UsageError(
            f"{python} cannot be run.", error.strerror or "", "--llama-python with an interpreter"
        ) from error
    if done.returncode or not out.is_file():
        raise _failed(python, kind, done.returncode, done.stderr)


def types_in(path: Path) -> dict[str, int]:
    """Number format -> bytes of the tensors that have it, the largest first."""
    sizes: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return dict(sizes.most_common())


def _failed(python: Path, kind: str, status: int, said: str) -> ConmoeError:
    if "ModuleNotFoundError" in said:
        return UsageError(
            f"{python} has no {PACKAGE}.",
            said.strip().splitlines()[-1],
            f"{python} -m pip install {PACKAGE}",
        )
    if status == _TOO_OLD:
        return UsageError(
            f"The {PACKAGE} of {python} takes no importance matrix.",
            "it is older than 0.3.36",
            f"{python} -m pip install --upgrade {PACKAGE}, or --no-imatrix",
        )
    if status == _UNKNOWN_TYPE:
        return UsageError(
            f"The {PACKAGE} of {python} does not know {kind}.",
            "",
            f"{python} -m pip install --upgrade {PACKAGE}, or another type",
        )
    lines = [line.strip(" =") for line in said.splitlines() if line.strip(" =")]
    return QuantisationFailed(
        f"llama.cpp did not quantise to {kind} (status {status}).",
        "it says: " + " ".join(lines[-_LAST_LINES:])[-300:] if lines else "",
        "another type; Q8_0 takes every matrix whose rows are multiples of 32",
    )
