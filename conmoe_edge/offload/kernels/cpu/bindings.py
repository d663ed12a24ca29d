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
from functools import cache

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.quantise import Matrix, quantise
from conmoe_edge.offload.kernels.cpu.build import Unavailable, library
from conmoe_edge.offload.kernels.cpu.reference import product
from conmoe_edge.offload.kernels.cpu.structs import (
    CODES,
    PLAIN,
    TILE,
    AttentionTable,
    BlockTable,
    Cached,
    Form,
    LayerTable,
    Positions,
    Prepared,
    PrototypeTable,
    RmsNorm,
    RouterTable,
)

__all__ = [
    "AttentionTable",
    "BlockTable",
    "Cached",
    "Form",
    "LayerTable",
    "Operator",
    "Positions",
    "Prepared",
    "PrototypeTable",
    "RmsNorm",
    "RouterTable",
    "operator",
    "why_not",
]

_ACTIVATIONS = (torch.float32, torch.bfloat16)
_ABSENT = -2  # as in operator.cpp


class Operator:
    """The compiled operator of this machine."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._few_rows = handle.conmoe_few_rows
        self._gated = handle.conmoe_gated_experts
        self._combine = handle.conmoe_combine
        self._attend = handle.conmoe_attend
        self._expand = handle.conmoe_expand
        integer, number, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        self._few_rows.argtypes = [
            *(integer, number, address, address, address, number, number, address),
            *(number, number, number, integer),
        ]
        self._gated.argtypes = [
            *(integer, integer, number, address, address, address, address, address, address),
            *(address, number, number, address, integer),
        ]
        self._combine.argtypes = [
            *(number, address, address, number, address, address),
            *(address, number, integer),
        ]
        self._combine.restype = None
        self._layer = handle.conmoe_layer
        self._layer.argtypes = [
            *(address, address, address, integer, number),
            *(address, address, address, integer),
        ]
        self._layer.restype = number
        self._norm = handle.conmoe_rms_norm
        self._norm.argtypes = [address, address, address, number, integer]
        self._norm.restype = None
        self._attend.argtypes = [
            *(number, address, address, address, number, address),
            *(number, number, number, ctypes.c_float),
        ]
        self._attend.restype = None
        self._attention = handle.conmoe_attention
        self._attention.argtypes = [
            *(address, address, address, address, number),
            *(address, address, number, number, number, address),
        ]
        self._block = handle.conmoe_block
        self._block.argtypes = [*self._attention.argtypes, address]
        self._route = handle.conmoe_route
        self._route.argtypes = [address] * 5
        self._decoder = handle.conmoe_decoder
        self._decoder.argtypes = [address, address, *self._block.argtypes]
        self._decoder.restype = number
        self._expand.argtypes = [integer, *[address] * 3, *[number] * 3]
        self.name = f"native, {torch.backends.cpu.get_cpu_capability()}"

    def prepare(self, matrix: Matrix) -> Prepared | None:
        """``matrix`` for use here; ``None`` where its form, device or strides are not for this operator."""
        code = PLAIN.get(matrix.values.dtype) if matrix.kind == "plain" else CODES[matrix.kind]
        tensors = [one for one in (matrix.values, matrix.scales) if one is not None]
        if code is None or any(
            not one.is_contiguous() or one.device.type != "cpu" for one in tensors
        ):
            return None
        if matrix.kind == "int4" and matrix.rows % TILE:
            return None
        scales = 0 if matrix.scales is None else matrix.scales.data_ptr()
        form = Form(code, matrix.rows, matrix.columns, matrix.group)
        values, one = matrix.values.data_ptr(), ctypes.c_void_p * 1
        return Prepared(form, values, scales, matrix, (one(values), one(scales)))

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
            downs: n of one kind, [H, I], perhaps in groups of different sizes.
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
            (ctypes.c_int64 * count)(*[one.form.group for one in downs]),
            x.dtype == torch.bfloat16,
        )
        assert not failed, "prepare lets only forms pass that the operator takes"
        return y

    def one_row(self, matrix: Prepared, x: Tensor) -> Tensor:
        """W x as of ``few_rows``, for one matrix and one row [1, K]: [1, R]."""
        form, narrow = matrix.form, x.dtype == torch.bfloat16
        y = torch.empty(1, form.rows, dtype=x.dtype)
        failed = self._few_rows(
            *(form.code, 1, *matrix.tables, x.data_ptr(), 0, 1, y.data_ptr()),
            *(form.rows, form.columns, form.group, narrow),
        )
        assert not failed, "prepare lets only forms pass that the operator takes"
        return y

    def combine(
        self,
        y: Tensor,
        weights: Sequence[float],
        dtype: torch.dtype,
        constants: Sequence[tuple[Tensor, float]] = (),
    ) -> Tensor:
        """sum over i of weights[i] * y[i], then of the constants' weights times them, in their orders.

        Args:
            y: fp32 [n, H], contiguous.
            weights: n of them.
            dtype: fp32 or bf16, of the result [1, H].
            constants: (fp32 [H], weight) each.
        """
        assert y.dtype == torch.float32 and y.is_contiguous() and dtype in _ACTIVATIONS
        out, extra = torch.empty(1, y.shape[1], dtype=dtype), len(constants)
        self._combine(
            len(weights),
            y.data_ptr(),
            (ctypes.c_float * len(weights))(*weights),
            extra,
            (ctypes.c_void_p * extra)(*[row.data_ptr() for row, _ in constants]),
            (ctypes.c_float * extra)(*[weight for _, weight in constants]),
            out.data_ptr(),
            y.shape[1],
            dtype == torch.bfloat16,
        )
        return out

    def layer(
        self,
        layer: LayerTable,
        slots: Tensor,
        gates: Tensor,
        x: Tensor,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, int] | None:
        """The routed experts' output of one token, and how many prototypes gave it: ``layer.asked`` names them.

        Args:
            layer: what is behind its slots.
            slots: int64, the K slots that the router chose, contiguous.
            gates: fp32 or bf16, theirs, contiguous.
            x: fp32 or bf16, H values, contiguous.
            residual: like ``x``; what the output is added to.

        Returns:
            Like ``x``: the same bits as ``gated_experts``, ``combine`` and a sum. ``None`` where one of the prototypes
            is not in memory.
        """
        out = torch.empty_like(x)
        count = self._layer(
            *(layer.address, slots.data_ptr(), gates.data_ptr(), gates.dtype == torch.bfloat16),
            *(slots.numel(), x.data_ptr(), None if residual is None else residual.data_ptr()),
            *(out.data_ptr(), x.dtype == torch.bfloat16),
        )
        if count == _ABSENT:
            return None
        assert count >= 0, "only experts that ``gated_experts`` takes are in a table"
        return out, count

    def rms_norm(self, norm: RmsNorm, x: Tensor) -> Tensor:
        """The norm of the last axis of ``x``, fp32 or bf16 and contiguous."""
        out = torch.empty_like(x)
        self._norm(
            *(norm.address, x.data_ptr(), out.data_ptr(), x.numel() // norm.columns),
            x.dtype == torch.bfloat16,
        )
        return out

    def attention(
        self, table: AttentionTable, x: Tensor, positions: Positions, cached: Cached
    ) -> Tensor:
        """A layer's attention for one new token, whose keys and values are written into the cache.

        Args:
            table: the layer.
            x: bf16, ``hidden`` values, contiguous.
            positions: where the token stands.
            cached: where keys and values lie.

        Returns:
            Like ``x``: the same bits as ``one_row``, ``rms_norm``, rotary positions with every step
            rounded, and ``attend``.
        """
        out = torch.empty_like(x)
        failed = self._attention(
            *(table.address, x.data_ptr(), positions.cos, positions.sin, positions.count),
            *(cached.keys, cached.values, cached.key_step, cached.value_step, cached.held),
            out.data_ptr(),
        )
        assert not failed, "prepare lets only forms pass that the operator takes"
        return out

    def block(
        self, table: BlockTable, x: Tensor, positions: Positions, cached: Cached
    ) -> tuple[Tensor, Tensor]:
        """x + attention(before(x)), and that through the norm behind; arguments as of ``attention``."""
        out, normed = torch.empty_like(x), torch.empty_like(x)
        failed = self._block(
            *(table.address, x.data_ptr(), positions.cos, positions.sin, positions.count),
            *(cached.keys, cached.values, cached.key_step, cached.value_step, cached.held),
            *(out.data_ptr(), normed.data_ptr()),
        )
        assert not failed, "prepare lets only forms pass that the operator takes"
        return out, normed

    def route(self, table: RouterTable, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits bf16 [1, E], gates and slots (int64) [1, K] of one token: the greatest first, of equal ones the first.

        Args:
            table: the router.
            x: bf16, H values, contiguous.
        """
        logits = torch.empty(1, table.slots, dtype=torch.bfloat16)
        gates = torch.empty(1, table.chosen, dtype=table.gates)
        slots = torch.empty(1, table.chosen, dtype=torch.int64)
        failed = self._route(
            *(table.address, x.data_ptr(), logits.data_ptr(), gates.data_ptr(), slots.data_ptr())
        )
        assert not failed, "prepare lets only forms pass that the operator takes"
        return logits, gates, slots

    def decoder(
        self,
        block: BlockTable,
        router: RouterTable,
        experts: LayerTable,
        x: Tensor,
        positions: Positions,
        cached: Cached,
    ) -> tuple[Tensor, int] | None:
        """``block``, ``route`` and ``layer`` in one call: the same bits, and how many prototypes there were.

        ``None`` where one of them is not in memory: ``router.between`` has what the experts are to be given.
        """
        out = torch.empty_like(x)
        count = self._decoder(
            *(block.address, router.address, experts.address, x.data_ptr()),
            *(positions.cos, positions.sin, positions.count),
            *(cached.keys, cached.values, cached.key_step, cached.value_step, cached.held),
            *(router.between_address, out.data_ptr()),
        )
        if count == _ABSENT:
            return None
        assert count >= 0, "only forms that the operator takes are in tables"
        return out, count

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor | None:
        """softmax(q K^T * scaling) V of one new token: two products with few rows.

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
        each, width = query.shape[1] // groups, value.shape[3]
        q = query.reshape(groups, each, query.shape[3]).contiguous()
        out = torch.empty(1, 1, query.shape[1], width, dtype=torch.bfloat16)
        self._attend(
            *(groups, _heads(key), _heads(value), q.data_ptr(), each, out.data_ptr()),
            *(length, q.shape[2], width, scaling),
        )
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
    weight = torch.randn(TILE, 96, generator=generator, dtype=torch.float32, device="cpu")
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
