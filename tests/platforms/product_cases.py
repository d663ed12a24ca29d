"""Products that a library of the operator has to compute, with what comes out, in a file that needs no Python.

``check_library.cpp`` reads it: a processor or a system that is emulated tests the very library that a wheel has.

    case: nine numbers of 64 bits (function, kind, rows, columns, group, tokens, bytes of the three arrays), near
          (fp64), values, scales, x (fp32 [tokens, columns]); then wanted: a count (64 bits) and that many fp64

The functions are those below. A gate's second matrix is a case of its own behind the first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Grid
from conmoe_edge.checkpoint.format.quantise import Kind, Matrix, quantise
from conmoe_edge.offload.kernels.cpu import reference
from conmoe_edge.offload.kernels.cpu.structs import CODES, GRID_CODES, PLAIN

FEW_ROWS, MANY_ROWS, EXPAND, GATED, DOWN = range(5)
_KINDS: tuple[Kind, ...] = ("int8", "int4", "mxfp4", "q6", "q4", "q3", "q2")


def write_cases(path: Path) -> int:
    """Every stored form through every function that takes it; how many cases there are."""
    cases = list(_cases())
    path.write_bytes(b"".join(cases))
    return len(cases)


def _cases() -> Iterator[bytes]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    forms: list[tuple[Kind, Grid | None]] = [(kind, None) for kind in _KINDS]
    for dtype, zeros in GRID_CODES:
        forms.append(("grid4", Grid(32, dtype, zeros)))
    for dtype in PLAIN:
        matrix = quantise((random(96, 160) * 0.1).to(dtype), "plain")
        yield from _products(PLAIN[dtype], matrix, random(3, 160), 1e-4)
    for kind, grid in forms:
        code = CODES[kind] if grid is None else GRID_CODES[grid.dtype, grid.zeros]
        matrix = quantise(random(192, 256) * 0.1, kind, grid)
        yield from _products(code, matrix, random(3, 256), 2e-3)
        x = random(17, 256)
        yield _case(MANY_ROWS, code, matrix, x, reference.product(matrix, x), 2e-3)
        up, down = (
            quantise(random(256, 128) * 0.1, kind, grid),
            quantise(random(128, 128), kind, grid),
        )
        x = random(1, 128)
        yield _case(GATED, code, up, x, torch.empty(0), 2e-2)
        yield _case(DOWN, code, down, x, reference.gated(up, down, x), 2e-2)


def _products(code: int, matrix: Matrix, x: Tensor, near: float) -> Iterator[bytes]:
    yield _case(FEW_ROWS, code, matrix, x, reference.product(matrix, x), near)
    yield _case(FEW_ROWS, code, matrix, x[:1], reference.product(matrix, x[:1]), near)
    yield _case(EXPAND, code, matrix, x[:0], matrix.dequantise(), 1e-6)


def _case(
    function: int, code: int, matrix: Matrix, x: Tensor, wanted: Tensor, near: float
) -> bytes:
    parts = [_bytes(matrix.values), b"" if matrix.scales is None else _bytes(matrix.scales)]
    parts.append(_bytes(x.float()))
    numbers = (function, code, matrix.rows, matrix.columns, matrix.group, len(x))
    head = struct.pack("<9qd", *numbers, *map(len, parts), near)
    return b"".join([head, *parts, struct.pack("<q", wanted.numel()), _bytes(wanted.double())])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
