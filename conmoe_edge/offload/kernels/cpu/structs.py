"""What the operator is told of weights that stay: their form, and where they lie.

Each table holds addresses of tensors and keeps those alive. The fields of the ``ctypes`` structures are those of the
structures of the same names in ``*.h`` and ``operator.cpp``.

Memory: a few addresses. Raises ``ValueError`` for sizes that do not go together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import TILES
from conmoe_edge.checkpoint.format.quantise import Kind, Matrix
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap

PLAIN = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
CODES: dict[Kind, int] = {"int8": 3, "int4": 4}
TILE = TILES[0]


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
    tables: tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]]


class _Prototypes(ctypes.Structure):
    _fields_: ClassVar = [
        (name, ctypes.c_void_p)
        for name in ("up_values", "up_scales", "down_values", "down_scales", "widths", "groups")
    ]


class PrototypeTable:
    """Where the prototypes lie that are in memory now, by their numbers: a view of the residency's table."""

    def __init__(self, count: int) -> None:
        """None of ``count`` is there."""
        pointers = ctypes.c_void_p * count
        self._up = (pointers(), pointers())
        self._down = (pointers(), pointers())
        self._widths = (ctypes.c_int64 * count)()
        self._groups = (ctypes.c_int64 * count)()
        self._kept: list[tuple[Prepared, Prepared] | None] = [None] * count
        arrays = (*self._up, *self._down, self._widths, self._groups)
        self._struct = _Prototypes(*[ctypes.addressof(array) for array in arrays])
        self.address = ctypes.addressof(self._struct)

    def __len__(self) -> int:
        """Numbers are below this."""
        return len(self._kept)

    def __contains__(self, number: int) -> bool:
        return self._kept[number] is not None

    def put(self, number: int, up: Prepared, down: Prepared) -> None:
        """The prototype is there; both matrices are kept alive until it is ``remove``d."""
        self._kept[number] = (up, down)
        for (values, scales), one in ((self._up, up), (self._down, down)):
            values[number], scales[number] = one.values, one.scales
        self._widths[number], self._groups[number] = down.form.columns, down.form.group

    def remove(self, number: int) -> None:
        """It is not there any more."""
        self._kept[number] = None
        for array in (*self._up, *self._down):
            array[number] = None


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [
        *[(name, ctypes.c_int64) for name in ("up_kind", "down_kind", "slots", "columns")],
        ("up_group", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("prototypes", "target", "factor", "constants")],
        ("asked", ctypes.c_void_p),
    ]


class LayerTable:
    """A layer's map for ``Operator.layer``."""

    def __init__(
        self,
        prototypes: PrototypeTable,
        forms: tuple[Form, Form],
        slots: SlotMap,
        constants: Tensor | None,
    ) -> None:
        """Render ``slots``. The table and the constants are kept alive.

        Args:
            prototypes: of the package.
            forms: of the two matrices of the layer's prototypes, which ``gated_experts`` takes together. Their number
                of neurons, and the groups that it allows, are looked up in the table.
            slots: the layer's map.
            constants: fp32 [C, H], contiguous; ignored where no slot has one.

        Raises:
            ValueError: a prototype or a constant that is not there, or a constant of another width or format.
        """
        up, down = forms
        if not all(-1 <= number < len(prototypes) for number in slots.targets):
            raise ValueError(f"layer {slots.layer} names a prototype beyond {len(prototypes)}")
        factors = (ctypes.c_float * len(slots))(*slots.scales) if slots.is_scaled else None
        rows = _rows(slots, constants, up.columns) if slots.has_constants else None
        arrays = ((ctypes.c_int64 * len(slots))(*slots.targets), factors, rows)
        self._asked = (ctypes.c_int64 * len(slots))()
        self._kept = (prototypes, constants, arrays)
        self._struct = _Layer(
            *(up.code, down.code, len(slots), up.columns, up.group, prototypes.address),
            *[None if array is None else ctypes.addressof(array) for array in arrays],
            ctypes.addressof(self._asked),
        )
        self.address = ctypes.addressof(self._struct)

    def asked(self, count: int) -> list[int]:
        """The numbers of the ``count`` prototypes that the last call computed, ascending."""
        return self._asked[:count]


def _rows(slots: SlotMap, constants: Tensor | None, width: int) -> ctypes.Array[ctypes.c_void_p]:
    """The address of every slot's constant, null where it has none."""
    given = () if constants is None else tuple(constants.shape)
    if constants is None or len(given) != 2 or given[0] < slots.constant_rows or given[1] != width:
        raise ValueError(
            f"layer {slots.layer} needs {slots.constant_rows} constants of {width} numbers"
        )
    if constants.dtype != torch.float32 or not constants.is_contiguous():
        raise ValueError("constants are fp32 and contiguous")
    first, step = constants.data_ptr(), width * constants.element_size()
    places = [None if row == NONE else first + row * step for row in slots.constants]
    return (ctypes.c_void_p * len(slots))(*places)


class _Norm(ctypes.Structure):
    _fields_: ClassVar = [
        *[("weight", ctypes.c_void_p), ("columns", ctypes.c_int64), ("epsilon", ctypes.c_float)],
        *[(name, ctypes.c_int32) for name in ("narrow", "plus_one", "early")],
    ]


class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis, for ``Operator.rms_norm``."""

    def __init__(self, weight: Tensor, epsilon: float, plus_one: bool, early: bool) -> None:
        """``weight`` is kept alive.

        Args:
            weight: fp32 or bf16 [width], contiguous.
            epsilon: as above.
            plus_one: the weight is one less than what is multiplied with.
            early: what is multiplied with it is rounded to the format of x first.
        """
        self.weight, self.columns = weight, weight.numel()
        self.place = weight.data_ptr()
        narrow = weight.dtype == torch.bfloat16
        self.struct = _Norm(self.place, self.columns, epsilon, narrow, plus_one, early)
        self.address = ctypes.addressof(self.struct)


class _Linear(ctypes.Structure):
    _fields_: ClassVar = [
        *[(name, ctypes.c_int64) for name in ("kind", "rows", "columns", "group")],
        *[(name, ctypes.c_void_p) for name in ("values", "scales", "bias")],
    ]


def _linear(matrix: Prepared, bias: Tensor | None = None) -> _Linear:
    form = matrix.form
    return _Linear(
        *(form.code, form.rows, form.columns, form.group),
        *(matrix.values, matrix.scales, None if bias is None else bias.data_ptr()),
    )


class _Attention(ctypes.Structure):
    _fields_: ClassVar = [
        *[("inputs", _Linear * 3), ("output", _Linear), ("norms", _Norm * 2)],
        *[(name, ctypes.c_int64) for name in ("heads", "groups", "width")],
        ("scaling", ctypes.c_float),
    ]


class AttentionTable:
    """A layer's attention for ``Operator.attention``."""

    def __init__(
        self,
        linears: Sequence[tuple[Prepared, Tensor | None]],
        norms: Sequence[RmsNorm | None],
        width: int,
        scaling: float,
    ) -> None:
        """Every argument is kept alive.

        Args:
            linears: matrix and bias (bf16 [R]) of queries, keys, values and the output.
            norms: of queries and of keys, over all heads or over each, as their columns say.
            width: of a head, in queries, keys and values.
            scaling: of the scores.

        Raises:
            ValueError: sizes that do not go together.
        """
        query, key, value, output = [one.form for one, _ in linears]
        heads, groups = query.rows // width, key.rows // width
        hidden = query.columns
        fits = query.rows == heads * width == output.columns and key == value
        fits = fits and key.rows == groups * width and heads % max(1, groups) == 0
        if not fits or {key.columns, output.rows} != {hidden}:
            raise ValueError("queries, keys, values and output do not go together")
        for norm, rows in zip(norms, (query.rows, key.rows), strict=True):
            if norm is not None and norm.columns not in (rows, width):
                raise ValueError("a norm is neither over all heads nor over each")
        self.hidden, self.groups, self.width = hidden, groups, width
        self._kept = (linears, norms)
        layers = [_linear(one, bias) for one, bias in linears]
        self.struct = _Attention(
            (_Linear * 3)(*layers[:3]),
            layers[3],
            (_Norm * 2)(*[_Norm() if norm is None else norm.struct for norm in norms]),
            *(heads, groups, width, scaling),
        )
        self.address = ctypes.addressof(self.struct)


class _Block(ctypes.Structure):
    _fields_: ClassVar = [("attention", _Attention), ("before", _Norm), ("after", _Norm)]


class BlockTable:
    """A layer's attention and the norms before it and behind it, for ``Operator.block``."""

    def __init__(self, attention: AttentionTable, before: RmsNorm, after: RmsNorm) -> None:
        """Every argument is kept alive.

        Raises:
            ValueError: a norm of another width.
        """
        if {before.columns, after.columns} != {attention.hidden}:
            raise ValueError("a norm has another width than the layer")
        self._kept = (attention, before, after)
        self._struct = _Block(attention.struct, before.struct, after.struct)
        self.address = ctypes.addressof(self._struct)


class _Router(ctypes.Structure):
    _fields_: ClassVar = [
        *[("linear", _Linear), ("chosen", ctypes.c_int64)],
        *[(name, ctypes.c_int32) for name in ("normed", "narrow")],
    ]


class _Between(ctypes.Structure):
    _fields_: ClassVar = [
        (name, ctypes.c_void_p) for name in ("sum", "normed", "logits", "gates", "slots")
    ]


class RouterTable:
    """A router for ``Operator.route``: softmax over all slots, the greatest of which are chosen.

    Attributes:
        slots, chosen, hidden: how many there are, how many a token gets, the width of its activations.
        gates: their format.
        between: what ``Operator.decoder`` found on the way to the experts, overwritten by the next call: the sum behind
            the attention, its norm (bf16 [1, H]), the slots (int64 [1, K]) and their gates.
    """

    def __init__(self, matrix: Prepared, chosen: int, normed: bool, narrow: bool) -> None:
        """``matrix`` is kept alive.

        Args:
            matrix: [E, H].
            chosen: slots of a token, at most E.
            normed: whether gates are divided by their sum.
            narrow: whether they are bf16, else fp32.
        """
        form = matrix.form
        self.slots, self.chosen, self.hidden = form.rows, chosen, form.columns
        self.gates = torch.bfloat16 if narrow else torch.float32
        self._struct = _Router(_linear(matrix), chosen, normed, narrow)
        self.address = ctypes.addressof(self._struct)

        def room(columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(1, columns, dtype=dtype, device="cpu")

        self.between = Between(
            *(room(self.hidden), room(self.hidden)),
            *(room(chosen, torch.int64), room(chosen, self.gates)),
        )
        logits = room(self.slots)
        self._kept = (matrix, logits)
        found = self.between
        places = (found.summed, found.normed, logits, found.gates, found.slots)
        self._between = _Between(*[one.data_ptr() for one in places])
        self.between_address = ctypes.addressof(self._between)


@dataclass(frozen=True, slots=True)
class Between:
    """See ``RouterTable.between``."""

    summed: Tensor
    normed: Tensor
    slots: Tensor
    gates: Tensor


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys and values of ``held`` tokens in memory that has room for one more: bf16 [heads, room, width].

    Addresses of the first head's, and how many numbers lie between two heads.
    """

    keys: int
    values: int
    key_step: int
    value_step: int
    held: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, held: int) -> Cached:
        """In ``keys`` and ``values`` [1, heads, room, width], whose rows are contiguous; they are not kept alive."""
        return cls(keys.data_ptr(), values.data_ptr(), keys.stride(1), values.stride(1), held)


class Positions:
    """Where a token stands, as its layers are told: cosines and sines for the first numbers of a head, whose first half
    turns with the second.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        """Both bf16, contiguous, of one token; they are kept alive."""
        self._kept = (cos, sin)
        self.cos, self.sin, self.count = cos.data_ptr(), sin.data_ptr(), cos.numel()
