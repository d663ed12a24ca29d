"""The functions of the compiled library, as methods on tensors (``bindings.py`` gives the one of this machine).

For one token every weight is used once, so time is bytes over memory bandwidth (``benchmarks/kernels.py``). Weights in
8 and 4 bits meet activations in 8 bits (``reference.py``), so that a block is summed in whole numbers: widening weights
to fp32 takes a processor longer than the memory takes to bring them.

Memory: the activations in fp32. Every method raises ``ValueError`` for a tensor of another format, shape, device or
order than it says, before an address is used, and ``MemoryError`` where the operator found no memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import LOW_HEAD, bits_of, in_tiles
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.offload.kernels.cpu.attention_tables import (
    AttentionTable,
    Cached,
    LatentTable,
    Positions,
)
from conmoe_edge.offload.kernels.cpu.decoder_tables import (
    BlockTable,
    RouterTable,
    between_room,
)
from conmoe_edge.offload.kernels.cpu.structs import (
    CODES,
    GRID_CODES,
    PLAIN,
    TILE,
    ExpertGate,
    Form,
    LayerTable,
    MlpTable,
    Prepared,
    RmsNorm,
)
from conmoe_edge.offload.kernels.cpu.together_tables import FoundTogether, places_of

_BF16, _FP32 = torch.bfloat16, torch.float32
_SILU = ExpertGate()
_SILU_STRUCT = _SILU.struct
_ABSENT, _MEMORY = -2, -4  # as in operator.cpp
_TILED = frozenset({*CODES.values(), *GRID_CODES.values()}) - {CODES["int8"]}
_MANY_GROUPS = (32, 64, 128, 256)
"""Columns of a group that whole rows of a panel (64) are divided into, or that are made of such."""
_int, _long, _float, _at = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_TOKEN = (_at, _at, _at, _long, _at, _at, _long, _long, _long, _int)
"""x, cos, sin, ..., keys, values, ..., whether they are packed."""
_FUNCTIONS: dict[str, tuple[type, Sequence[type]]] = {
    "few_rows": (_int, (_int, _long, _at, _at, _at, _long, _long, _at, _long, _long, _long, _int)),
    "gated_experts": (
        _int,
        (*(_int, _int, _long, *[_at] * 7, _long, _long, _at, _int), _at, _at, _at),
    ),
    "combine": (_int, (_long, _at, _at, _long, _at, _at, _at, _long, _int)),
    "layer": (_long, (_at, _at, _at, _int, _long, _at, _at, _at, _int)),
    "dense": (_int, (_at, _at, _at)),
    "rms_norm": (_int, (_at, _at, _at, _long, _int)),
    "attend": (_int, (_long, _at, _at, _at, _long, _at, _long, _long, _long, _float)),
    "attention": (_int, (_at, *_TOKEN, _at)),
    "latent": (_int, (_at, *_TOKEN, _at)),
    "block": (_int, (_at, *_TOKEN, _at, _at)),
    "route": (_int, (_at, _at, _at, _at, _at)),
    "feed_forward": (_long, (_at, _at, _at, _at, _at, _at, _at)),
    "decoder": (_long, (_at, _at, _at, _at, *_TOKEN, _at, _at)),
    "expand": (_int, (_int, _at, _at, _at, _int, _long, _long, _long)),
    "byte_products": (_long, (_long,)),
    "many_rows": (_int, (_int, _at, _at, _at, _long, _at, _long, _long, _long, _int)),
    "many_experts": (
        _int,
        (
            *(_int, _int, _long, *[_at] * 7, _long, _long, _at, _int),
            *(*[_at] * 3, _long, *[_at] * 3, _long),
        ),
    ),
    "decoder_together": (_long, (_at, _at, _at, _at, _long, *[_at] * 4)),
    "gated_together": (
        _int,
        (
            *(_int, _int, _long, *[_at] * 5, _long, *[_at] * 4, _long, _long, _at, _int),
            _at,
            _at,
            _at,
        ),
    ),
    "dense_together": (_int, (_at, _long, _at, _at)),
}
"""Results and arguments of the functions in operator.cpp, whose names there begin with ``conmoe_``; before these comes
the number of threads.
"""


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"the operator does not take this: {what}")


def _failed(code: int) -> NoReturn:
    if code == _MEMORY:
        raise MemoryError("the operator found no memory")
    _refuse({-1: "a matrix of a form that it has no kernel for"}.get(code, f"code {code}"))


def _narrow(x: Tensor, count: int) -> bool:
    """Whether ``x`` is bf16, not fp32; checks that it is one of the two and ``count`` numbers in a row."""
    dtype = x.dtype
    if dtype is not _BF16 and dtype is not _FP32:
        _refuse(f"activations in {dtype}")
    if not x.is_cpu or x.numel() != count or not x.is_contiguous():
        _refuse(f"activations {list(x.shape)} on {x.device}, strides {x.stride()}, for {count}")
    return dtype is _BF16


def _only_narrow(x: Tensor, count: int) -> None:
    if not _narrow(x, count):
        _refuse("activations in fp32")


def _on_threads(function: Any) -> Callable[..., int]:
    """``function`` on as many threads as torch uses now."""
    threads = torch.get_num_threads
    return lambda *arguments: function(threads(), *arguments)


class Operator:
    """The compiled operator of this machine."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        """The functions of ``handle``.

        Raises:
            AttributeError: one of them is not there.
        """
        found = {}
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(handle, f"conmoe_{name}")
            function.restype, function.argtypes = result, (_long, *arguments)
            found[name] = _on_threads(function)
        self._few_rows, self._gated = found["few_rows"], found["gated_experts"]
        self._combine, self._layer = found["combine"], found["layer"]
        self._norm, self._attend = found["rms_norm"], found["attend"]
        self._dense, self._latent = found["dense"], found["latent"]
        self._feed_forward = found["feed_forward"]
        self._attention, self._block = found["attention"], found["block"]
        self._route, self._decoder = found["route"], found["decoder"]
        self._expand = found["expand"]
        self._byte_products = found["byte_products"]
        self._many_rows, self._many_experts = found["many_rows"], found["many_experts"]
        self._decoder_together = found["decoder_together"]
        self._gated_together = found["gated_together"]
        self._dense_together = found["dense_together"]
        handle.conmoe_level.restype = ctypes.c_char_p
        self.level: str = (handle.conmoe_level() or b"").decode()
        """The instruction set that it was compiled for, as of ``levels.py``."""
        self.name = f"native, {self.level}"

    def prepare(self, matrix: Matrix) -> Prepared | None:
        """``matrix`` for use here; ``None`` where its form, device or strides are not for this operator."""
        rows, columns, group, scales = matrix.rows, matrix.columns, matrix.group, matrix.scales
        plain = matrix.kind == "plain"
        code = PLAIN.get(matrix.values.dtype) if plain else CODES.get(matrix.kind)
        grid = matrix.grid if matrix.kind == "grid4" else None
        if grid is not None:
            code = GRID_CODES[grid.dtype, grid.zeros]
        tensors = [one for one in (matrix.values, scales) if one is not None]
        if code is None or any(
            not one.is_contiguous() or one.device.type != "cpu" for one in tensors
        ):
            return None
        dtype, scale_dtype = torch.uint8, _BF16
        if in_tiles(matrix.kind):
            if rows % TILE or group < 2 or group % 2 or columns % group:
                return None
            shape, scaled = (rows, columns * bits_of(matrix.kind) // 8), columns // group * rows
            if grid is not None:
                scaled, scale_dtype = scaled * (1 + grid.zeros), getattr(torch, grid.dtype)
            elif matrix.kind == "int4":
                scaled *= 2
            elif matrix.kind == "mxfp4":
                scale_dtype = torch.float8_e8m0fnu
            else:
                scaled, scale_dtype = scaled + LOW_HEAD * rows, torch.uint8
        else:
            dtype, shape, scaled = torch.int8, (rows, columns), rows
        if matrix.values.shape != shape or not rows or not columns:
            return None
        if not plain and (
            scales is None
            or matrix.values.dtype != dtype
            or scales.dtype != scale_dtype
            or scales.numel() != scaled
        ):
            return None
        at = 0 if scales is None else scales.data_ptr()
        form = Form(code, rows, columns, group)
        values, one = matrix.values.data_ptr(), ctypes.c_void_p * 1
        return Prepared(form, values, at, matrix, (one(values), one(at)))

    def few_rows(self, matrices: Sequence[Prepared], x: Tensor) -> Tensor:
        """y[i, t] = W_i x[i, t], in one pass over the weights.

        Args:
            matrices: n of one form.
            x: fp32 or bf16 [n, t, K], or [1, t, K] for all of them, contiguous.

        Returns:
            [n, t, R] in the format of ``x``, as ``reference.product`` says; each token's result is the
            same bits whatever n and t are.
        """
        form, count = matrices[0].form, len(matrices)
        inputs, tokens, columns = x.shape
        if inputs not in (1, count) or columns != form.columns:
            _refuse(f"activations {list(x.shape)} for {count} matrices of {form.columns} columns")
        if any(one.form != form for one in matrices):
            _refuse("matrices of several forms in one call")
        narrow = _narrow(x, inputs * tokens * columns)
        y = torch.empty(count, tokens, form.rows, dtype=x.dtype)
        table = ctypes.c_void_p * count
        stride = tokens * form.columns if inputs > 1 else 0
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
            narrow,
        )
        if failed:
            _failed(failed)
        return y

    def gated_experts(
        self,
        ups: Sequence[Prepared],
        downs: Sequence[Prepared],
        x: Tensor,
        gate: ExpertGate = _SILU,
        biases: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """y[i] = D_i gate(G_i x, U_i x): whole experts for one token.

        Args:
            ups: n of one kind, [2 I, H]: the rows of G and U as ``gate`` says; I may differ.
            downs: n of one kind, [H, I], perhaps in groups of different sizes.
            x: fp32 or bf16, H values, contiguous.
            gate: what an expert makes of both halves, silu(g) * u if nothing is said.
            biases: bf16 [2 I] and [H] of each, or ``None``.

        Returns:
            fp32 [n, H]; each row is the same bits whatever n is.
        """
        up, down, count = ups[0].form, downs[0].form, len(ups)
        narrow = _narrow(x, up.columns)
        values, sizes, added = _experts(ups, downs, biases)
        y = torch.empty(count, down.rows, dtype=torch.float32)
        how = _SILU_STRUCT if gate is _SILU else gate.struct
        failed = self._gated(
            *(up.code, down.code, count, *values, x.data_ptr(), y.data_ptr(), sizes[0]),
            *(up.columns, up.group, sizes[1], narrow, *added, ctypes.addressof(how)),
        )
        if failed:
            _failed(failed)
        return y

    def gated_together(
        self,
        ups: Sequence[Prepared],
        downs: Sequence[Prepared],
        x: Tensor,
        asking: Sequence[Sequence[int]],
        gate: ExpertGate = _SILU,
        biases: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """What several tokens ask of experts: each expert is read once.

        Args:
            ups, downs, gate, biases: as of ``gated_experts``.
            x: fp32 or bf16 [T, H], contiguous.
            asking: the rows of ``x`` that ask for each expert, one at least.

        Returns:
            fp32 [n, H], a row for each that asks, expert after expert: the same bits as of ``gated_experts``.
        """
        up, down, tokens = ups[0].form, downs[0].form, len(x)
        narrow = _narrow(x, tokens * up.columns)
        rows = [row for some in asking for row in some]
        if len(asking) != len(ups) or not all(asking) or not 0 <= min(rows) <= max(rows) < tokens:
            _refuse(f"{len(asking)} lists of tokens for {len(ups)} experts and {tokens} tokens")
        values, sizes, added = _experts(ups, downs, biases)
        starts = [0, *accumulate(len(some) for some in asking)]
        y = torch.empty(len(rows), down.rows, dtype=torch.float32)
        how = _SILU_STRUCT if gate is _SILU else gate.struct
        failed = self._gated_together(
            *(up.code, down.code, len(ups), *values, x.data_ptr(), tokens),
            *((ctypes.c_int64 * len(starts))(*starts), (ctypes.c_int64 * len(rows))(*rows)),
            *(y.data_ptr(), sizes[0], up.columns, up.group, sizes[1], narrow, *added),
            ctypes.addressof(how),
        )
        if failed:
            _failed(failed)
        return y

    def one_row(self, matrix: Prepared, x: Tensor) -> Tensor:
        """W x as of ``few_rows``, for one matrix and one row [1, K]: [1, R]."""
        form = matrix.form
        narrow = _narrow(x, form.columns)
        y = torch.empty(1, form.rows, dtype=x.dtype)
        failed = self._few_rows(
            *(form.code, 1, *matrix.tables, x.data_ptr(), 0, 1, y.data_ptr()),
            *(form.rows, form.columns, form.group, narrow),
        )
        if failed:
            _failed(failed)
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
        columns = y.shape[1]
        if _narrow(y, len(weights) * columns) or dtype not in (_FP32, _BF16):
            _refuse(f"outputs in {y.dtype}, or a sum in {dtype}")
        for row, _ in constants:
            if _narrow(row, columns):
                _refuse("a constant in bf16")
        out, extra = torch.empty(1, y.shape[1], dtype=dtype), len(constants)
        failed = self._combine(
            len(weights),
            y.data_ptr(),
            (ctypes.c_float * len(weights))(*weights),
            extra,
            (ctypes.c_void_p * extra)(*[row.data_ptr() for row, _ in constants]),
            (ctypes.c_float * extra)(*[weight for _, weight in constants]),
            out.data_ptr(),
            columns,
            dtype is _BF16,
        )
        if failed:
            _failed(failed)
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
        narrow, chosen = _narrow(x, layer.hidden), slots.numel()
        narrow_gates = _narrow(gates, chosen)
        if slots.dtype is not torch.int64 or not slots.is_cpu or not slots.is_contiguous():
            _refuse(f"slots in {slots.dtype} on {slots.device}, strides {slots.stride()}")
        if residual is not None and _narrow(residual, layer.hidden) != narrow:
            _refuse("a residual in another format than the activations")
        out = torch.empty_like(x)
        count = self._layer(
            *(layer.address, slots.data_ptr(), gates.data_ptr(), narrow_gates, chosen),
            *(x.data_ptr(), None if residual is None else residual.data_ptr()),
            *(out.data_ptr(), narrow),
        )
        if count == _ABSENT:
            return None
        if count < 0:
            _failed(count)
        return out, count

    def rms_norm(self, norm: RmsNorm, x: Tensor) -> Tensor:
        """The norm of the last axis of ``x``, fp32 or bf16 and contiguous."""
        rows = x.numel() // norm.columns
        narrow, out = _narrow(x, rows * norm.columns), torch.empty_like(x)
        failed = self._norm(norm.address, x.data_ptr(), out.data_ptr(), rows, narrow)
        if failed:
            _failed(failed)
        return out

    def dense(self, table: MlpTable, x: Tensor) -> Tensor:
        """A dense gated layer for one token: bf16, H values, contiguous; the result is like ``x``."""
        _only_narrow(x, table.hidden)
        out = torch.empty_like(x)
        failed = self._dense(table.address, x.data_ptr(), out.data_ptr())
        if failed:
            _failed(failed)
        return out

    def attention(
        self,
        table: AttentionTable | LatentTable,
        x: Tensor,
        positions: Positions | None,
        cached: Cached,
    ) -> Tensor:
        """A layer's attention for one new token, whose keys and values are written into the cache.

        Args:
            table: the layer.
            x: bf16, ``hidden`` values, contiguous.
            positions: where the token stands.
            cached: where keys and values lie.

        Returns:
            Like ``x``. With an ``AttentionTable`` the same bits as ``one_row``, ``rms_norm``, rotary positions and
            ``attend``.
        """
        _only_narrow(x, table.hidden)
        if cached.sizes != table.cache:
            _refuse(f"a cache of {cached.sizes} for {table.cache}")
        function = self._latent if isinstance(table, LatentTable) else self._attention
        out = torch.empty_like(x)
        failed = function(
            *(table.address, x.data_ptr(), *table.turning.angles(positions)),
            *cached.arguments,
            out.data_ptr(),
        )
        if failed:
            _failed(failed)
        return out

    def block(
        self, table: BlockTable, x: Tensor, positions: Positions | None, cached: Cached
    ) -> tuple[Tensor, Tensor]:
        """The sum behind a layer's attention (``BlockTable``), and that through the norm ``after``; arguments as of
        ``attention``.
        """
        _only_narrow(x, table.hidden)
        attention = table.attention
        if attention is None or cached.sizes != attention.cache:
            _refuse(f"a cache of {cached.sizes} for {attention and attention.cache}")
        out, normed = torch.empty_like(x), torch.empty_like(x)
        failed = self._block(
            *(table.address, x.data_ptr(), *attention.turning.angles(positions)),
            *cached.arguments,
            *(out.data_ptr(), normed.data_ptr()),
        )
        if failed:
            _failed(failed)
        return out, normed

    def route(self, table: RouterTable, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [1, E], gates and slots (int64) [1, K] of one token: the greatest first, of equal ones the first.

        Args:
            table: the router.
            x: bf16, H values, contiguous.
        """
        _only_narrow(x, table.hidden)
        logits = torch.empty(1, table.slots, dtype=table.logits)
        gates = torch.empty(1, table.chosen, dtype=table.gates)
        slots = torch.empty(1, table.chosen, dtype=torch.int64)
        failed = self._route(
            *(table.address, x.data_ptr(), logits.data_ptr(), gates.data_ptr(), slots.data_ptr())
        )
        if failed:
            _failed(failed)
        return logits, gates, slots

    def feed_forward(
        self,
        block: BlockTable,
        router: RouterTable | None,
        experts: LayerTable | None,
        x: Tensor,
        dense: MlpTable | None = None,
    ) -> tuple[Tensor, int] | None:
        """The second half of a decoder layer for one token: from the sum behind its mixer to its output.

        Args:
            block: norms and multiplier; its attention is not asked.
            router, experts: both, or neither.
            x: bf16, H values, contiguous: the sum.
            dense: a layer whose output is added to that of the experts, or is all there is.

        Returns:
            Like ``x``, and how many prototypes there were; ``None`` where one of them is not in memory. Then
            ``router.between`` has what the experts are to be given, and nothing of ``dense`` is computed.
        """
        _only_narrow(x, block.hidden)
        first, second, third, between = _halves(block, router, experts, dense)
        out = torch.empty_like(x)
        count = self._feed_forward(
            *(block.address, first, second, third, x.data_ptr(), between, out.data_ptr())
        )
        if count == _ABSENT:
            return None
        if count < 0:
            _failed(count)
        return out, count

    def decoder(
        self,
        block: BlockTable,
        router: RouterTable | None,
        experts: LayerTable | None,
        x: Tensor,
        positions: Positions | None,
        cached: Cached,
        dense: MlpTable | None = None,
    ) -> tuple[Tensor, int] | None:
        """A whole decoder layer for one token: ``block``, then as ``feed_forward``, in one call and to the same bits.

        ``None`` where a prototype is not in memory, as there; the token's keys and values are written all the same.
        """
        _only_narrow(x, block.hidden)
        attention = block.attention
        if attention is None or cached.sizes != attention.cache:
            _refuse(f"a cache of {cached.sizes} for {attention and attention.cache}")
        first, second, third, between = _halves(block, router, experts, dense)
        out = torch.empty_like(x)
        count = self._decoder(
            *(block.address, first, second, third, x.data_ptr()),
            *attention.turning.angles(positions),
            *cached.arguments,
            *(between, out.data_ptr()),
        )
        if count == _ABSENT:
            return None
        if count < 0:
            _failed(count)
        return out, count

    def decoder_together(
        self,
        block: BlockTable,
        router: RouterTable | None,
        experts: LayerTable | None,
        x: Tensor,
        where: Sequence[tuple[Positions | None, Cached]],
        dense: MlpTable | None = None,
    ) -> FoundTogether:
        """``decoder`` for one token each of several answers: weights that they share are read once, and each token's
        results, and what is written into its cache, are the bits that it has alone.

        Args:
            block, router, experts, dense: as of ``decoder``.
            x: bf16 [T, H], contiguous.
            where: of every token, its position and the cache of its answer.

        Returns:
            With ``out`` ``None`` where a prototype is not in memory; the keys and values are written all the same.
        """
        tokens, attention = len(x), block.attention
        _only_narrow(x, tokens * block.hidden)
        if attention is None or len(where) != tokens or not tokens:
            _refuse(f"{tokens} tokens and {len(where)} places, or no attention")
        first, second, third, _ = _halves(block, router, experts, dense)
        places = places_of(attention, where)
        between, room, _kept = between_room(block.hidden, tokens, router)
        out = torch.empty_like(x)
        count = self._decoder_together(
            *(block.address, first, second, third, tokens, x.data_ptr(), ctypes.addressof(places)),
            *(ctypes.addressof(room), out.data_ptr()),
        )
        if count < 0 and count != _ABSENT:
            _failed(count)
        return FoundTogether(
            None if count < 0 else out,
            max(0, count),
            *(between.summed, between.normed, between.slots, between.gates),
        )

    def dense_together(self, table: MlpTable, x: Tensor) -> Tensor:
        """``dense`` for several tokens: bf16 [T, H], contiguous; each row has the bits that it has alone."""
        _only_narrow(x, len(x) * table.hidden)
        out = torch.empty_like(x)
        failed = self._dense_together(table.address, len(x), x.data_ptr(), out.data_ptr())
        if failed:
            _failed(failed)
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor | None:
        """softmax(q K^T * scaling) V of one new token: two products with few rows.

        Args:
            query: bf16 [1, heads, 1, D].
            key, value: bf16 [1, groups, T, D] and [1, groups, T, D']; ``groups`` divides ``heads``.
            scaling: of the scores.

        Returns:
            bf16 [1, 1, heads, D'], summed in fp32; ``None`` for strides that this does not take.
        """
        _, groups, length, columns = key.shape
        for one in (query, key, value):
            if one.dtype is not _BF16 or not one.is_cpu:
                _refuse(f"queries, keys or values in {one.dtype} on {one.device}")
        if query.shape[1] % groups or query.shape[3] != columns or value.shape[:3] != key.shape[:3]:
            _refuse(
                f"queries {list(query.shape)}, keys {list(key.shape)}, values {list(value.shape)}"
            )
        rows = [one.stride()[2:] == (one.shape[3], 1) for one in (key, value)]
        if not all(rows) or query.shape[2] != 1 or len(query) != 1:
            return None
        each, width = query.shape[1] // groups, value.shape[3]
        q = query.reshape(groups, each, query.shape[3]).contiguous()
        out = torch.empty(1, 1, query.shape[1], width, dtype=torch.bfloat16)
        failed = self._attend(
            *(groups, _heads(key), _heads(value), q.data_ptr(), each, out.data_ptr()),
            *(length, columns, width, scaling),
        )
        if failed:
            _failed(failed)
        return out

    def expand(self, matrix: Prepared, out: Tensor) -> Tensor:
        """The weights into ``out`` [R, K], contiguous, in fp32 or, rounded from it, in bf16."""
        form = matrix.form
        narrow = _narrow(out, form.rows * form.columns)
        if out.shape != (form.rows, form.columns):
            _refuse(f"room {list(out.shape)} in {out.dtype} for [{form.rows}, {form.columns}]")
        failed = self._expand(
            form.code,
            matrix.values,
            matrix.scales,
            out.data_ptr(),
            narrow,
            form.rows,
            form.columns,
            form.group,
        )
        if failed:
            _failed(failed)
        return out

    def many_rows(self, matrix: Prepared, x: Tensor) -> Tensor:
        """y[t] = W x[t] for the tokens of a prompt: whole weights are expanded, a part at a time, once for all of them.

        Args:
            matrix: in a form that ``takes_many`` names.
            x: fp32 or bf16 [t, K], contiguous.

        Returns:
            [t, R] in the format of ``x``, as ``reference.product`` says; each token's result is the same bits whatever
            t is.
        """
        form, tokens = matrix.form, len(x)
        narrow = _narrow(x, tokens * form.columns)
        y = torch.empty(tokens, form.rows, dtype=x.dtype)
        failed = self._many_rows(
            *(form.code, matrix.values, matrix.scales, x.data_ptr(), tokens, y.data_ptr()),
            *(form.rows, form.columns, form.group, narrow),
        )
        if failed:
            _failed(failed)
        return y

    def byte_products(self, rounds: int) -> int:
        """Products of bytes that stay in registers, by all threads: how many operations those were, each product and
        each sum one. What ``many_rows`` cannot pass.
        """
        return self._byte_products(rounds)

    def many_experts(
        self,
        ups: Sequence[Prepared],
        downs: Sequence[Prepared],
        x: Tensor,
        routed: tuple[Sequence[int], Tensor, Tensor],
        out: Tensor,
        gate: ExpertGate = _SILU,
        biases: Sequence[tuple[Tensor, Tensor]] | None = None,
        few: int | None = None,
    ) -> None:
        """out[row] += weight * D_i gate(G_i x[row], U_i x[row]) for the tokens of every expert, in the experts' order.

        One call or several give the same bits. An expert that few tokens want is computed by the kernels of single
        tokens, which round activations to the same bytes and add up in another order.

        Args:
            ups, downs, gate, biases: as of ``gated_experts``, in forms that ``takes_many`` names.
            x: fp32 or bf16 [T, H], contiguous.
            routed: where the tokens of each expert begin, n + 1 numbers; their rows, int64 [N], and weights, fp32 [N].
            out: fp32 [T, H], contiguous.
            few: how many tokens those are at the most; by default as many as suit the form.
        """
        up, down, count = ups[0].form, downs[0].form, len(ups)
        columns, (tokens, width) = up.columns, x.shape
        narrow = _narrow(x, tokens * columns)
        if width != columns or out.shape != x.shape or _narrow(out, tokens * columns):
            _refuse(f"activations {list(x.shape)} and outputs {list(out.shape)} in {out.dtype}")
        for one, other in zip(ups, downs, strict=True):
            mine, its = one.form, other.form
            if mine.code != up.code or mine.columns != columns or mine.group != up.group:
                _refuse("gate and up matrices of several forms in one call")
            if its.code != down.code or its.rows != columns or 2 * its.columns != mine.rows:
                _refuse("a down matrix that does not go with the others or with its up matrix")
        starts, rows, weights = routed
        _check_routes(starts, rows, weights, count, tokens)
        table, numbers = ctypes.c_void_p * count, ctypes.c_int64 * count
        added = [None, None]
        if biases is not None:
            sides = zip(zip(*biases, strict=True), (ups, downs), strict=True)
            added = [table(*_addresses(side, matrices)) for side, matrices in sides]
        how = _SILU_STRUCT if gate is _SILU else gate.struct
        failed = self._many_experts(
            *(up.code, down.code, count),
            table(*[one.values for one in ups]),
            table(*[one.scales for one in ups]),
            table(*[one.values for one in downs]),
            table(*[one.scales for one in downs]),
            *(x.data_ptr(), out.data_ptr()),
            numbers(*[one.form.columns for one in downs]),
            *(columns, up.group),
            numbers(*[one.form.group for one in downs]),
            *(narrow, *added, ctypes.addressof(how), tokens),
            (ctypes.c_int64 * (count + 1))(*starts),
            *(rows.data_ptr(), weights.data_ptr(), -1 if few is None else few),
        )
        if failed:
            _failed(failed)


def takes_many(form: Form) -> bool:
    """Whether ``many_rows`` takes matrices of this form, and ``many_experts`` those of experts."""
    if form.code == CODES["int8"]:
        return True
    return form.code in _TILED and form.group in _MANY_GROUPS


def _check_routes(
    starts: Sequence[int], rows: Tensor, weights: Tensor, count: int, tokens: int
) -> None:
    if len(starts) != count + 1 or list(starts) != sorted(starts) or starts[0] < 0:
        _refuse(f"tokens of {count} experts that begin at {list(starts)!s:.80}")
    if rows.dtype != torch.int64 or not rows.is_contiguous() or not rows.is_cpu:
        _refuse(f"rows in {rows.dtype} on {rows.device}")
    if len(rows) < starts[-1] or _narrow(weights, len(rows)):
        _refuse(f"{len(rows)} rows and {len(weights)} weights for {starts[-1]} tokens")
    if starts[-1] and not 0 <= int(rows.min()) <= int(rows.max()) < tokens:
        _refuse(f"a row beyond {tokens} tokens")


def _halves(
    block: BlockTable,
    router: RouterTable | None,
    experts: LayerTable | None,
    dense: MlpTable | None,
) -> tuple[int | None, int | None, int | None, int]:
    """The addresses of router, experts, dense layer and the room between attention and experts."""
    hidden = block.hidden
    if dense is not None and dense.hidden != hidden:
        _refuse(f"a dense layer of {dense.hidden} in a layer of {hidden}")
    third = None if dense is None else dense.address
    if router is None or experts is None:
        if router is not experts or dense is None:
            _refuse("a router without experts, experts without router, or nothing at all")
        return None, None, third, block.between_address
    if router.hidden != hidden or experts.hidden != hidden:
        _refuse(f"a router of {router.hidden} and experts of {experts.hidden} in one of {hidden}")
    return router.address, experts.address, third, router.between_address


def _experts(
    ups: Sequence[Prepared],
    downs: Sequence[Prepared],
    biases: Sequence[tuple[Tensor, Tensor]] | None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """Experts as the operator is told them: values and scales of both matrices; widths, and groups of the down
    matrices; biases.
    """
    up, down, count = ups[0].form, downs[0].form, len(ups)
    for one, other in zip(ups, downs, strict=True):
        mine, its = one.form, other.form
        if mine.code != up.code or mine.columns != up.columns or mine.group != up.group:
            _refuse("gate and up matrices of several forms in one call")
        if its.code != down.code or its.rows != down.rows or 2 * its.columns != mine.rows:
            _refuse("a down matrix that does not go with the others or with its up matrix")
    if down.rows != up.columns:
        _refuse(f"experts of {up.columns} inputs and {down.rows} outputs")
    table, numbers = ctypes.c_void_p * count, ctypes.c_int64 * count
    added: list[Any] = [None, None]
    if biases is not None:
        sides = zip(zip(*biases, strict=True), (ups, downs), strict=True)
        added = [table(*_addresses(side, matrices)) for side, matrices in sides]
    values = [
        table(*[getattr(one, name) for one in matrices])
        for matrices in (ups, downs)
        for name in ("values", "scales")
    ]
    sizes = [numbers(*[getattr(one.form, name) for one in downs]) for name in ("columns", "group")]
    return values, sizes, added


def _addresses(rows: Sequence[Tensor], matrices: Sequence[Prepared]) -> list[int]:
    """Of the biases of ``matrices``."""
    for row, matrix in zip(rows, matrices, strict=True):
        if not _narrow(row, matrix.form.rows):
            _refuse("a bias in fp32")
    return [row.data_ptr() for row in rows]


def _heads(tensor: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of [T, D] of every head."""
    first, step = tensor.data_ptr(), tensor.stride(1) * tensor.element_size()
    count = tensor.shape[1]
    return (ctypes.c_void_p * count)(*range(first, first + count * step, step))
