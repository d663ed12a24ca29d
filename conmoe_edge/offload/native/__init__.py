"""The hand-written operator: weights in any stored form times few rows of activations, at the speed of the memory.

``operator()`` is the one way in: an ``Operator``, or ``None`` where the machine cannot compile it (``why_not`` says
why); callers then use torch's own kernels. Which of the two it is depends on the machine, never on a stopwatch, so
results are the same bits from run to run.

For one token every weight is used once: time is bytes over memory bandwidth, and a kernel is good where it reads as
fast as the memory delivers. ``benchmarks/kernels.py`` prints what each kernel reaches. Weights in 8 and 4 bits meet
activations in 8 bits (``reference.py``), so that a block is summed in whole numbers: widening weights to fp32 takes a
processor longer than the memory takes to bring them.

Memory: the activations in fp32. Raises nothing of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from conmoe_edge.checkpoint.forms import TILES
from conmoe_edge.checkpoint.quantise import Kind, Matrix, quantise
from conmoe_edge.offload.native.build import Unavailable, library
from conmoe_edge.offload.native.reference import product

_PLAIN = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_CODES: dict[Kind, int] = {"int8": 3, "int4": 4}
_ACTIVATIONS = (torch.float32, torch.bfloat16)
_TILE = TILES[0]


@dataclass(frozen=True, slots=True)
class Form:
    """What matrices must have in common to be multiplied in one call."""

    code: int
    rows: int
    columns: int
    group: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A matrix with the addresses of its numbers; it keeps them alive."""

    form: Form
    values: int
    scales: int
    matrix: Matrix

    @property
    def gates_whole_tiles(self) -> bool:
        """Whether gate and up rows of this fused matrix begin with a tile each, so that ``gated_experts`` takes it."""
        return self.form.code != _CODES["int4"] or self.form.rows % (2 * _TILE) == 0


class Operator:
    """The compiled operator of this machine."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._few_rows = handle.conmoe_few_rows
        self._gated = handle.conmoe_gated_experts
        self._combine = handle.conmoe_combine
        self._weighted = handle.conmoe_weighted_rows
        self._expand = handle.conmoe_expand
        integer, number, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        self._few_rows.argtypes = [
            *(integer, number, address, address, address, number, number, address),
            *(number, number, number, integer),
        ]
        self._gated.argtypes = [
            *(integer, integer, number, address, address, address, address, address, address),
            *(address, number, number, number, integer),
        ]
        self._combine.argtypes = [number, address, address, address, number, integer]
        self._combine.restype = None
        self._weighted.argtypes = [
            *(integer, number, address, address, number, address),
            *(number, number, integer),
        ]
        self._expand.argtypes = [integer, *[address] * 3, *[number] * 3]
        self.name = f"native, {torch.backends.cpu.get_cpu_capability()}"

    def prepare(self, matrix: Matrix) -> Prepared | None:
        """``matrix`` for use here; ``None`` where its form, device or strides are not for this operator."""
        code = _PLAIN.get(matrix.values.dtype) if matrix.kind == "plain" else _CODES[matrix.kind]
        tensors = [one for one in (matrix.values, matrix.scales) if one is not None]
        if code is None or any(
            not one.is_contiguous() or one.device.type != "cpu" for one in tensors
        ):
            return None
        if matrix.kind == "int4" and matrix.rows % _TILE:
            return None
        scales = 0 if matrix.scales is None else matrix.scales.data_ptr()
        form = Form(code, matrix.rows, matrix.columns, matrix.group)
        return Prepared(form, matrix.values.data_ptr(), scales, matrix)

    def few_rows(self, matrices: Sequence[Prepared], x: Tensor) -> Tensor:
        """y[i, t] = W_i x[i, t], in one pass over the weights.

        Args:
            matrices: n of one form.
            x: fp32 or bf16 [n, t, K], or [1, t, K] for all of them, contiguous.

        Returns:
            [n, t, R] in the format of ``x``, as ``reference.product`` says; each token's result is the
            same bits whatever n and t are.
        """
        form, count, tokens = matrices[0].form, len(matrices), x.shape[1]
        assert x.dtype in _ACTIVATIONS and x.is_contiguous() and x.shape[2] == form.columns
        y = torch.empty(count, tokens, form.rows, dtype=x.dtype)
        table = ctypes.c_void_p * count
        stride = tokens * form.columns if x.shape[0] > 1 else 0
        failed = self._few_rows(
            form.code,
            count,
            table(*[one.values for one in matrices]),
            table(*[one.scales for one in matrices]),
            x.data_ptr(),
            stride,
            tokens,
            y.data_ptr(),
            form.rows,
            form.columns,
            form.group,
            x.dtype == torch.bfloat16,
        )
        assert not failed, "prepare lets only forms pass that the operator takes"
        return y

    def gated_experts(
        self, ups: Sequence[Prepared], downs: Sequence[Prepared], x: Tensor
    ) -> Tensor:
        """y[i] = D_i (silu(G_i x) * U_i x): whole experts with the usual gate, for one token.

        Args:
            ups: n of one kind, [2 I, H]: the rows of the gate before those of up; I may differ.
            downs: n of one kind, [H, I].
            x: fp32 or bf16, H values, contiguous.

        Returns:
            fp32 [n, H]; each row is the same bits whatever n is.
        """
        up, down, count = ups[0].form, downs[0].form, len(ups)
        assert x.dtype in _ACTIVATIONS and x.is_contiguous() and x.numel() == up.columns
        y = torch.empty(count, down.rows, dtype=torch.float32)
        table = ctypes.c_void_p * count
        failed = self._gated(
            up.code,
            down.code,
            count,
            table(*[one.values for one in ups]),
            table(*[one.scales for one in ups]),
            table(*[one.values for one in downs]),
            table(*[one.scales for one in downs]),
            x.data_ptr(),
            y.data_ptr(),
            (ctypes.c_int64 * count)(*[one.form.columns for one in downs]),
            up.columns,
            up.group,
            down.group,
            x.dtype == torch.bfloat16,
        )
        assert not failed, "``gates_whole_tiles`` lets only experts pass that the operator takes"
        return y

    def combine(self, y: Tensor, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
        """sum over i of weights[i] * y[i], in the order of i: fp32 [n, H] -> [1, H] in fp32 or bf16."""
        assert y.dtype == torch.float32 and y.is_contiguous() and dtype in _ACTIVATIONS
        out = torch.empty(1, y.shape[1], dtype=dtype)
        self._combine(
            len(weights),
            y.data_ptr(),
            (ctypes.c_float * len(weights))(*weights),
            out.data_ptr(),
            y.shape[1],
            dtype == torch.bfloat16,
        )
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor | None:
        """softmax(q K^T * scaling) V of one new token: two products with few rows, and torch's softmax between them.

        Args:
            query: bf16 [1, heads, 1, D].
            key, value: bf16 [1, groups, T, D] and [1, groups, T, D']; ``groups`` divides ``heads``.
            scaling: of the scores.

        Returns:
            bf16 [1, 1, heads, D'], summed in fp32; ``None`` for strides that this does not take.
        """
        _, groups, length, _ = key.shape
        rows = [one.stride()[2:] == (one.shape[3], 1) for one in (key, value)]
        if not all(rows) or query.shape[2] != 1 or len(query) != 1:
            return None
        each = query.shape[1] // groups
        x = query.float().reshape(groups, each, query.shape[3])
        scores = torch.empty(groups, each, length, dtype=torch.float32)
        none = (ctypes.c_void_p * groups)()
        code = _PLAIN[torch.bfloat16]
        failed = self._few_rows(
            *(code, groups, _heads(key), none, x.data_ptr(), each * x.shape[2], each),
            *(scores.data_ptr(), length, x.shape[2], 0, False),
        )
        weights = torch.softmax(scores.mul_(scaling), -1)
        out = torch.empty(1, 1, query.shape[1], value.shape[3], dtype=torch.bfloat16)
        failed |= self._weighted(
            *(code, groups, _heads(value), weights.data_ptr(), each, out.data_ptr()),
            *(length, value.shape[3], True),
        )
        assert not failed, "bf16 is taken"
        return out

    def expand(self, matrix: Prepared, out: Tensor) -> Tensor:
        """The weights as fp32 into ``out`` [R, K], contiguous."""
        form = matrix.form
        assert out.dtype == torch.float32 and out.is_contiguous()
        assert out.shape == (form.rows, form.columns)
        failed = self._expand(
            form.code,
            matrix.values,
            matrix.scales,
            out.data_ptr(),
            form.rows,
            form.columns,
            form.group,
        )
        assert not failed, "prepare lets only forms pass that the operator takes"
        return out


def _heads(tensor: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of [T, D] of every head."""
    first, step = tensor.data_ptr(), tensor.stride(1) * tensor.element_size()
    count = tensor.shape[1]
    return (ctypes.c_void_p * count)(*range(first, first + count * step, step))


def operator() -> Operator | None:
    """This machine's operator, compiled on the first call ever; ``None`` where there is none."""
    return _state()[0]


def why_not() -> str:
    """Why there is no operator; empty where there is one."""
    return _state()[1]


@cache
def _state() -> tuple[Operator | None, str]:
    try:
        made = Operator(ctypes.CDLL(str(library())))
        _check(made)
    except (Unavailable, OSError) as error:
        return None, str(error)
    return made, ""


def _check(made: Operator) -> None:
    """A compiler's mistake must not become a model's mistake: one small product in each form.

    Raises:
        Unavailable: a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    # The first call may come while transformers has set a default device and format of its own.
    weight = torch.randn(_TILE, 96, generator=generator, dtype=torch.float32, device="cpu")
    x = torch.randn(1, 2, 96, generator=generator, dtype=torch.float32, device="cpu")
    for kind in ("plain", "int8", "int4"):
        matrix = quantise(weight, kind)
        prepared = made.prepare(matrix)
        assert prepared is not None
        wide = matrix.dequantise()
        right = torch.allclose(
            made.few_rows([prepared], x)[0].double(), product(matrix, x[0]), atol=1e-4
        )
        if not right or not torch.allclose(made.expand(prepared, torch.empty_like(wide)), wide):
            raise Unavailable(f"the compiled operator computes {kind} weights wrongly")
