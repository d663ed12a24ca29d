"""Linear layers outside the routed experts: weights in 8, 6 and 4 bits, fast products with bf16 weights on a CPU.

``FusedLinear`` stands where transformers has ``nn.Linear``. How it multiplies follows from the processor, the stored
form and the number of rows (tokens), never from memory or a stopwatch:

==============================  =====================================================================================
fewer than 16 rows on a CPU     the native operator, which reads each weight once; without it torch's
                                own kernels (``mv``, ``_weight_int8pack_mm``), where there is one
quantised, 16 rows and more on  the operator: weights expanded to bytes, a part at a time, once for all rows, and
a CPU with the operator         multiplied in whole numbers with activations in 8 bits
quantised, else                 a block of weight rows at a time is expanded and multiplied: in fp32 on processors
                                without bf16 instructions, in the format of the activations elsewhere
bf16, 16 rows and more on a     the same: a block at a time in fp32
CPU without bf16 instructions
bf16, else                      ``nn.functional.linear``
==============================  =====================================================================================

Products in 16 bits on a CPU are made with a few numbers of rows only (``steady_rows.py``).

Memory beside the weights: one block (``DENSE_BLOCK_BYTES``) for the whole model, and the activations in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from conmoe_edge import compat
from conmoe_edge.checkpoint.format.forms import Kind, in_tiles
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.memory.heap import trim_heap
from conmoe_edge.offload.compute.fused_embedding import QuantisedEmbedding
from conmoe_edge.offload.compute.steady_rows import padded
from conmoe_edge.offload.compute.stored_weight import StoredWeight, room_for
from conmoe_edge.offload.compute.torch_backend import EXPANDED, MANY_ROWS, Machine, Scratch
from conmoe_edge.offload.kernels.cpu.bindings import Prepared, operator, takes_many
from conmoe_edge.offload.storage.slot_pool import host_buffer
from conmoe_edge.plan.needs import DENSE_BLOCK_BYTES
from conmoe_edge.units import round_up

ARENA_FROM_BYTES = 64 << 20
"""Below this, whole huge pages waste more than they save."""

_ALIGNMENT = 64


class DenseProducts:
    """How this machine multiplies with dense weights, and the scratch that all layers of a model share."""

    def __init__(self, machine: Machine, *, native: bool = True) -> None:
        """``native=False`` does without the compiled operator, as on machines that have no compiler."""
        self.machine = machine
        self.operator = operator() if native and machine.device == "cpu" else None
        self._scratch = Scratch(torch.device(machine.device))

    def prepare(self, matrix: Matrix) -> Prepared | None:
        """``matrix`` for the native operator; ``None`` where it is not for it."""
        return None if self.operator is None else self.operator.prepare(matrix)

    def apply(
        self, matrix: Matrix, prepared: Prepared | None, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """x [n, K] -> [n, R] in the format of ``x``."""
        plain = matrix.kind == "plain"
        if plain and x.dtype != matrix.values.dtype:
            return linear(x, matrix.values, bias)
        on_cpu = self.machine.device == "cpu"
        if on_cpu and 0 < x.shape[0] < MANY_ROWS and x.dtype != torch.float64:
            return self._few_rows(matrix, prepared, x, bias)
        if plain and (not on_cpu or self.machine.native_bf16):
            return linear(padded(x), matrix.values, bias)[: len(x)]
        many = len(x) >= MANY_ROWS and x.dtype != torch.float64
        if many and prepared is not None and takes_many(prepared.form):
            return self._many_rows(prepared, x, bias)
        return self._in_blocks(matrix, x, bias)

    def _many_rows(self, prepared: Prepared, x: Tensor, bias: Tensor | None) -> Tensor:
        assert self.operator is not None, "matrices are prepared by the operator only"
        # With a bias the sum is rounded once, at its end.
        wide = x if bias is None and x.dtype != torch.float16 else x.float()
        y = self.operator.many_rows(prepared, wide.contiguous())
        return (y if bias is None else y + bias).to(x.dtype)

    def _few_rows(
        self, matrix: Matrix, prepared: Prepared | None, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        if prepared is not None and self.operator is not None:
            # With a bias the sum is rounded once, at its end.
            wide = x if bias is None and x.dtype != torch.float16 else x.float()
            y = self.operator.few_rows([prepared], wide.contiguous().unsqueeze(0))[0]
        elif matrix.scales is not None:
            if compat.INT8_PRODUCT is None or matrix.kind != "int8":
                return self._in_blocks(matrix, x, bias)
            y = compat.INT8_PRODUCT(x.contiguous(), matrix.values, matrix.scales.to(x.dtype))
        elif len(x) == 1 and bias is None:
            y = torch.mv(matrix.values, x[0]).unsqueeze(0)
        else:
            return linear(padded(x), matrix.values, bias)[: len(x)]
        return (y if bias is None else y + bias).to(x.dtype)

    def _in_blocks(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = x.dtype
        if self.machine.device == "cpu" and not self.machine.native_bf16 and dtype.itemsize == 2:
            dtype = torch.float32
        wide = padded(x.to(dtype))
        out = torch.empty(x.shape[0], matrix.rows, dtype=x.dtype, device=x.device)
        step = max(1, DENSE_BLOCK_BYTES // (dtype.itemsize * matrix.columns))
        if in_tiles(matrix.kind):
            step = max(1, step // matrix.tile) * matrix.tile
        for start in range(0, matrix.rows, step):
            block = slice(start, min(start + step, matrix.rows))
            y = (wide @ self._block(matrix, block, dtype).T)[: len(x)]
            out[:, block] = y if bias is None else y + bias[block]
        return out

    def _block(self, matrix: Matrix, block: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weights in ``dtype``, in the scratch."""
        part = matrix.part(block)
        out = self._scratch.matrix(part.rows, part.columns, dtype)
        prepared = self.prepare(part) if dtype in EXPANDED else None
        if prepared is not None and self.operator is not None:
            return self.operator.expand(prepared, out)
        return part.dequantise(out=out)


def call_at_once(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``nn.Module.__call__`` without looking for hooks where there are none."""
    if self._forward_hooks or self._forward_pre_hooks or self._backward_hooks:
        return nn.Module.__call__(self, *args, **kwargs)
    return self.forward(*args, **kwargs)


class FusedLinear(nn.Linear):
    """A linear layer of a loaded package: y = x W^T + b, for inference only.

    ``weight`` is bf16 [out, in], or the values of a quantised form with ``weight_scale`` as ``quantise.py`` has it.
    """

    weight_scale: Tensor | None
    __call__ = call_at_once

    def __init__(
        self,
        like: nn.Linear,
        products: DenseProducts,
        kind: Kind = "plain",
        shares: QuantisedEmbedding | None = None,
    ) -> None:
        """Take the place of ``like``: with its weight, or on the meta device with room for a quantised ``kind``.

        A head that has its weight from the table ``shares`` has its scales from there.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias
        self.products = products
        self.stored = StoredWeight(kind)
        self._prepared: Prepared | None = None
        object.__setattr__(self, "_table", shares)  # a module of another place
        self.register_buffer("weight_scale", None)
        self.weight = like.weight
        if shares is not None:
            self.weight = shares.weight
        elif kind != "plain":
            # No parameter: the first one in floating point would be taken for the model's own format.
            self.weight, self.weight_scale = room_for(like.out_features, like.in_features, kind)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the format of ``input``."""
        engine = self.products.operator
        if engine is not None and input.numel() == self.in_features and self.bias is None:
            # The usual step of a decode, by itself: every line here is cold between two weights.
            known = input.dtype == torch.bfloat16 or input.dtype == torch.float32
            prepared = self.prepared_for(input.dtype)
            if known and prepared is not None and input.device.type == "cpu":
                y = engine.one_row(prepared, input.contiguous())
                return y.view(*input.shape[:-1], self.out_features)
        with torch.no_grad():
            return self._any_rows(input)

    def prepared_for(self, dtype: torch.dtype) -> Prepared | None:
        """The weights as they lie now, where ``DenseProducts.apply`` would give a row of ``dtype`` to the operator."""
        matrix = self._current()
        return self._prepared if matrix.kind != "plain" or matrix.values.dtype == dtype else None

    @property
    def in_bytes(self) -> bool:
        """Whether a prompt's products are made of bytes."""
        self._current()
        return self._prepared is not None and takes_many(self._prepared.form)

    def _any_rows(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, self.in_features)
        matrix = self._current()
        out = self.products.apply(matrix, self._prepared, flat, self.bias)
        return out.view(*input.shape[:-1], self.out_features)

    def _current(self) -> Matrix:
        """The weights as they lie now; they may have been moved since the last call."""
        # Not by name: attributes of a module that are parameters are slow to look up.
        weight = self._parameters["weight"]
        matrix = self.stored.known(weight)  # pyright: ignore[reportArgumentType]
        if matrix is None:
            table: QuantisedEmbedding | None = self._table  # pyright: ignore[reportAssignmentType]
            scales = self.weight_scale if table is None else table.weight_scale
            matrix = self.stored.matrix(self.weight, scales)
            self._prepared = self.products.prepare(matrix)
        return matrix


def into_one_place(weights: Iterable[Tensor]) -> int:
    """Move weights on the CPU out of the files that they are mapped from, into one mapping of huge pages; the bytes
    that it holds.

    A mapped file is read when its pages are first touched, eight megabytes around each of them, and given up under
    pressure: a row of the embedding would cost a token more than its experts. Where there is too little for huge pages
    each weight gets memory of its own, and the result is 0. One weight at a time is there twice.
    """
    found = {id(one): one for one in weights if one.device.type == "cpu"}.values()
    places: list[tuple[Tensor, int]] = []
    end = 0
    for weight in found:  # a shared one once
        places.append((weight, end))
        end = round_up(end + weight.numel() * weight.element_size(), _ALIGNMENT)
    if end < ARENA_FROM_BYTES:
        for weight in found:
            weight.data = weight.detach().clone()
        return 0
    memory = host_buffer(end, touch=False)
    for weight, start in places:
        raw = memory[start : start + weight.numel() * weight.element_size()]
        weight.data = raw.view(weight.dtype).view(weight.shape).copy_(weight.detach())
    trim_heap()
    return end
