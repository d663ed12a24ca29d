"""Weights through llama.cpp's quantisers and back. A program: it runs in the Python with ``llama_cpp`` and ``gguf``.

Jobs come as lines of JSON on stdin: {"type", "weights", "importance", "out"}. ``weights`` names a .npy file [E, R, C]
of fp32 (E matrices whose rows are outputs), ``importance`` one [E, C] (mean square of each column's input) or is null.
The matrices as they come back are written to ``out``; the answer is a line of JSON: {"bits"} a weight, or {"error"}.

Rows are padded with zeros to a multiple of 256 columns, the block of most types. Only those of the type count as bits.
Memory: the matrices of one job twice. Loads ``libggml-base`` of ``llama-cpp-python``.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

BLOCK = 256
_SMALLEST = 1e-9
"""Added to importances: a column that no token used still counts a little, where nothing else does."""


def main() -> None:
    """Answer jobs until stdin ends."""
    library = _library()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer: dict[str, Any] = {"bits": _round_trip(library, job)}
        except (ValueError, KeyError, NotImplementedError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _library() -> Any:
    folder = Path(str(llama_cpp.__file__)).parent / "lib"
    found = [path for name in ("*ggml-base.so", "*ggml-base.dylib") for path in folder.glob(name)]
    if not found:
        sys.exit(f"libggml-base is not in {folder}")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    counts = [ctypes.c_int64] * 3
    pointers = [ctypes.c_void_p] * 2
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *pointers, *counts, ctypes.c_void_p]
    return library


def _round_trip(library: Any, job: dict[str, Any]) -> float:
    kind = gguf.GGMLQuantizationType[job["type"]]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    weights = np.load(job["weights"])
    experts, rows, columns = weights.shape
    padded = -(-columns // BLOCK) * BLOCK
    importance = None if job["importance"] is None else np.load(job["importance"])
    library.ggml_quantize_init(int(kind))
    for expert in range(experts):
        source = np.zeros((rows, padded), np.float32)
        source[:, :columns] = weights[expert]
        worth = None
        if importance is not None:
            worth = np.full(padded, _SMALLEST, np.float32)
            worth[:columns] += importance[expert]
        target = np.zeros((rows, padded // block * size), np.uint8)
        written = library.ggml_quantize_chunk(
            int(kind),
            source.ctypes.data,
            target.ctypes.data,
            0,
            rows,
            padded,
            None if worth is None else worth.ctypes.data,
        )
        if written != target.nbytes:
            raise ValueError(f"{job['type']}: {written} bytes written, {target.nbytes} expected")
        weights[expert] = gguf.quants.dequantize(target, kind)[:, :columns]
    np.save(job["out"], weights)
    return size * 8 / block


if __name__ == "__main__":
    main()
