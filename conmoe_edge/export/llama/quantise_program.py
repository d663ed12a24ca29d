"""Quantise a GGUF file with llama.cpp's own library. A program: it runs in the Python that has ``llama_cpp``.

A job comes as JSON on stdin: {"source", "out", "type", "threads", "importance": FILE.npz or null}. Status 0 means that
``out`` is whole; 3 that the ``llama_cpp`` here is too old for an importance matrix; 4 that it does not know the type.
What llama.cpp says goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

import numpy as np

TOO_OLD, UNKNOWN_TYPE = 3, 4


def main() -> int:
    """Do the job; returns the status."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    job = json.load(sys.stdin)
    kind = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['type']}", None)
    if kind is None:
        return UNKNOWN_TYPE
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kind
    params.nthread = job["threads"]
    kept: list[Any] = []  # ctypes does not keep what a pointer points to
    if job["importance"] is not None:
        if not hasattr(llama_cpp, "llama_model_imatrix_data"):
            return TOO_OLD
        params.imatrix = _importance(llama_cpp.llama_model_imatrix_data, job["importance"], kept)
    return llama_cpp.llama_model_quantize(
        os.fsencode(job["source"]), os.fsencode(job["out"]), ctypes.byref(params)
    )


def _importance(entry_of: Any, path: str, kept: list[Any]) -> Any:
    """A C array of names and numbers; the last one has no name."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: np.ascontiguousarray(file[name], np.float32).ravel() for name in file.files}
    array = (entry_of * (len(found) + 1))()
    for entry, (name, values) in zip(array, sorted(found.items()), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
        kept += [values, entry.name]
    kept.append(array)
    return array


if __name__ == "__main__":
    sys.exit(main())
