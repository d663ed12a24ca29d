"""What the operator is told of weights that stay: matrices, norms, experts and dense layers.

Each table holds addresses of tensors and keeps those alive; ``attention_tables.py`` and ``decoder_tables.py`` have the
others. A ``ctypes`` structure ``_Name`` has the fields of the structure ``Name`` in ``csrc``, and the compiler compares
them (``build.py``). The tables are a few addresses each, and raise ``ValueError`` for sizes or formats that do not go
together; what a function is given is checked against its table once more (``bindings.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import TILES
from conmoe_edge.checkpoint.format.quantise import Kind, Matrix
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap

PLAIN = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
CODES: dict[Kind, int] = {"int8": 3, "int4": 4, "mxfp4": 5, "q4": 6, "q3": 7, "q2": 8, "q6": 9}
GRID_CODES = {
    ("float16", False): 10,
    ("float16", True): 11,
    ("bfloat16", False): 12,
    ("bfloat16", True): 13,
}
"""Number format of the scales of grid4, and whether there are zero points."""
TILE = TILES[0]
Turn = Literal["halves", "split", "pairs-wide", "halves-wide", "not"]
"""How rotary positions turn the numbers of a head (``attention_tables.py``)."""
Scores = Literal["softmax", "sigmoid", "top-softmax", "sparsemixer"]
"""What a router chooses by (``RouterTable``)."""


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
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in ("up_bias", "down_bias", "up_kinds", "down_kinds", "up_groups")
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
        self._biases = (pointers(), pointers())
        self._forms = tuple((ctypes.c_int64 * count)() for _ in range(3))
        self._biases_kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: list[tuple[Prepared, Prepared] | None] = [None] * count
        self._wanted: dict[int, frozenset[tuple[int, ...]]] = {}
        arrays = (*self._up, *self._down, self._widths, self._groups, *self._biases, *self._forms)
        self._struct = _Prototypes(*[ctypes.addressof(array) for array in arrays])
        self.address = ctypes.addressof(self._struct)

    def __len__(self) -> int:
        """Numbers are below this."""
        return len(self._kept)

    def __contains__(self, number: int) -> bool:
        return self._kept[number] is not None

    def put(
        self,
        number: int,
        up: Prepared,
        down: Prepared,
        biases: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """The prototype is there; its matrices and biases (bf16) are kept alive until it is ``remove``d.

        Raises:
            ValueError: matrices that do not go together or are not what a layer expects, or biases of another size or
                format.
        """
        if up.form.rows != 2 * down.form.columns or down.form.rows != up.form.columns:
            raise ValueError(f"the matrices of prototype {number} do not go together")
        kin = _kin(up.form, down.form)
        if kin not in self._wanted.get(number, (kin,)):
            raise ValueError(f"prototype {number} has another form than its layer expects")
        self._kept[number] = (up, down)
        if biases is not None:
            self._biases_kept[number] = biases
            for array, bias, one in zip(self._biases, biases, (up, down), strict=True):
                array[number] = _row(bias, one.form.rows, torch.bfloat16)
        for (values, scales), one in ((self._up, up), (self._down, down)):
            values[number], scales[number] = one.values, one.scales
        self._widths[number], self._groups[number] = down.form.columns, down.form.group
        for array, value in zip(
            self._forms, (up.form.code, down.form.code, up.form.group), strict=True
        ):
            array[number] = value

    def expect(self, number: int, forms: Sequence[tuple[Form, Form]]) -> None:
        """A layer computes with the prototype as it does with one of these forms, whose numbers of neurons alone (and
        the groups that they allow) may be others.

        Raises:
            ValueError: it is there in another form, or another layer expects one.
        """
        kins, there = frozenset(_kin(*pair) for pair in forms), self._kept[number]
        fits = there is None or _kin(there[0].form, there[1].form) in kins
        if not fits or self._wanted.setdefault(number, kins) != kins:
            raise ValueError(f"prototype {number} has another form than its layer expects")

    def remove(self, number: int) -> None:
        """It is not there any more."""
        self._kept[number] = None
        self._biases_kept.pop(number, None)
        for array in (*self._up, *self._down, *self._biases):
            array[number] = None


def _kin(up: Form, down: Form) -> tuple[int, ...]:
    """What a layer's call takes to be the same of all its prototypes."""
    return up.code, up.columns, up.group, down.code


class _Gate(ctypes.Structure):
    _fields_: ClassVar = [
        *[(name, ctypes.c_float) for name in ("alpha", "limit")],
        ("interleaved", ctypes.c_int32),
    ]


@dataclass(frozen=True, slots=True)
class ExpertGate:
    """What an expert makes of its gate g and its other half u: silu(g) * u.

    With a ``limit`` as gpt-oss does: min(g, limit) * sigmoid(alpha * min(g, limit)) * (u within +-limit, plus 1).
    ``interleaved``: the rows of g and u take turns, else those of g lie before those of u.
    """

    alpha: float = 0.0
    limit: float = 0.0
    interleaved: bool = False

    @property
    def struct(self) -> _Gate:
        return _Gate(self.alpha, self.limit, self.interleaved)


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [
        *[(name, ctypes.c_int64) for name in ("slots", "columns")],
        *[(name, ctypes.c_void_p) for name in ("prototypes", "target", "factor", "constants")],
        ("asked", ctypes.c_void_p),
        ("gate", _Gate),
    ]


class LayerTable:
    """A layer's map for ``Operator.layer``."""

    def __init__(
        self,
        prototypes: PrototypeTable,
        forms: Sequence[tuple[Form, Form]],
        slots: SlotMap,
        constants: Tensor | None,
    ) -> None:
        """Render ``slots``. The table and the constants are kept alive.

        Args:
            prototypes: of the package.
            forms: of the two matrices of the layer's prototypes, each kind once; all take a token of the same size.
                Their number of neurons, and the groups that it allows, are looked up in the table.
            slots: the layer's map.
            constants: fp32 [C, H], contiguous; ignored where no slot has one.

        Raises:
            ValueError: a prototype or a constant that is not there, a prototype that is there in another form, or a
                constant of another width or format.
        """
        sizes = {up.columns for up, _ in forms}
        if len(sizes) != 1:
            raise ValueError(f"prototypes of layer {slots.layer} take {sorted(sizes)} numbers")
        (hidden,) = sizes
        if not all(-1 <= number < len(prototypes) for number in slots.targets):
            raise ValueError(f"layer {slots.layer} names a prototype beyond {len(prototypes)}")
        for number in slots.prototypes:
            prototypes.expect(number, forms)
        factors = (ctypes.c_float * len(slots))(*slots.scales) if slots.is_scaled else None
        rows = _rows(slots, constants, hidden) if slots.has_constants else None
        arrays = ((ctypes.c_int64 * len(slots))(*slots.targets), factors, rows)
        self._asked = (ctypes.c_int64 * len(slots))()
        self._kept = (prototypes, constants, arrays)
        self._struct = _Layer(
            *(len(slots), hidden, prototypes.address),
            *[None if array is None else ctypes.addressof(array) for array in arrays],
            ctypes.addressof(self._asked),
        )
        self.address = ctypes.addressof(self._struct)
        self.hidden = hidden

    def with_gate(self, gate: ExpertGate) -> LayerTable:
        """The same table, whose experts have this gate."""
        self._struct.gate = gate.struct
        return self

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
    if constants.dtype != torch.float32 or not constants.is_contiguous() or not constants.is_cpu:
        raise ValueError("constants are fp32, contiguous and in host memory")
    first, step = constants.data_ptr(), width * constants.element_size()
    places = [None if row == NONE else first + row * step for row in slots.constants]
    return (ctypes.c_void_p * len(slots))(*places)


class _Norm(ctypes.Structure):
    _fields_: ClassVar = [
        *[("weight", ctypes.c_void_p), ("shift", ctypes.c_void_p)],
        *[("columns", ctypes.c_int64), ("epsilon", ctypes.c_float)],
        *[(name, ctypes.c_int32) for name in ("narrow", "plus_one", "early", "centred")],
    ]


class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis, for ``Operator.rms_norm``.

    With a ``shift`` the mean is taken off x first, and the shift is added at the end: ``nn.LayerNorm``.
    """

    def __init__(
        self,
        weight: Tensor,
        epsilon: float,
        plus_one: bool,
        early: bool,
        shift: Tensor | None = None,
    ) -> None:
        """``weight`` and ``shift`` are kept alive.

        Args:
            weight: fp32 or bf16 [width], contiguous.
            epsilon: as above.
            plus_one: the weight is one less than what is multiplied with.
            early: what is multiplied with it is rounded to the format of x first.
            shift: as ``weight``; with it, the weight is as it is and applied late.

        Raises:
            ValueError: a weight of another format or order.
        """
        if weight.dtype not in (torch.bfloat16, torch.float32) or weight.ndim != 1:
            raise ValueError(f"a norm's weight {list(weight.shape)} in {weight.dtype}")
        self.weight, self.columns = weight, weight.numel()
        _row(weight, self.columns, weight.dtype)
        self.place = weight.data_ptr()
        narrow = weight.dtype == torch.bfloat16
        if shift is not None and (plus_one or early):
            raise ValueError("a norm with a shift takes its weight as it is, and late")
        self._shift = shift
        self.struct = _Norm(
            *(self.place, _row(shift, self.columns, weight.dtype), self.columns, epsilon),
            *(narrow, plus_one, early, shift is not None),
        )
        self.address = ctypes.addressof(self.struct)


class _Linear(ctypes.Structure):
    _fields_: ClassVar = [
        *[(name, ctypes.c_int64) for name in ("kind", "rows", "columns", "group")],
        *[(name, ctypes.c_void_p) for name in ("values", "scales", "bias")],
    ]


def _row(row: Tensor | None, count: int, dtype: torch.dtype) -> int | None:
    """The address of ``count`` numbers, which the caller keeps alive.

    Raises:
        ValueError: they are others.
    """
    if row is None:
        return None
    if row.numel() != count or row.dtype != dtype or not row.is_cpu or not row.is_contiguous():
        raise ValueError(f"a row {list(row.shape)} in {row.dtype} for {count} in {dtype}")
    return row.data_ptr()


def _linear(matrix: Prepared, bias: Tensor | None = None) -> _Linear:
    form = matrix.form
    return _Linear(
        *(form.code, form.rows, form.columns, form.group),
        *(matrix.values, matrix.scales, _row(bias, form.rows, torch.bfloat16)),
    )


_NO_MATRIX = _Linear()
_NO_NORM = _Norm()


class _Mlp(ctypes.Structure):
    _fields_: ClassVar = [("inputs", _Linear * 2), ("output", _Linear), ("gate", _Linear)]


class MlpTable:
    """A dense gated layer D (silu(G x) * U x), for ``Operator.dense``, or beside or in place of experts.

    Every step is rounded to bf16. ``hidden``: the width of its activations.
    """

    def __init__(
        self,
        gate: Prepared,
        up: Prepared,
        down: Prepared,
        *,
        biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        share: Prepared | None = None,
    ) -> None:
        """Every argument is kept alive.

        Args:
            gate, up: [I, H].
            down: [H, I].
            biases: of the three, bf16.
            share: [1, H]; the output is times the sigmoid of its product (``shared_expert_gate``).

        Raises:
            ValueError: sizes that do not go together.
        """
        width, hidden = gate.form.rows, gate.form.columns
        fits = (up.form.rows, up.form.columns) == (width, hidden)
        fits = fits and (down.form.rows, down.form.columns) == (hidden, width)
        if share is not None:
            fits = fits and (share.form.rows, share.form.columns) == (1, hidden)
        if not fits:
            raise ValueError("the matrices of a dense layer do not go together")
        self.hidden = hidden
        self._kept = (gate, up, down, biases, share)
        first, second, third = [
            _linear(one, bias) for one, bias in zip((gate, up, down), biases, strict=True)
        ]
        shared = _NO_MATRIX if share is None else _linear(share)
        self._struct = _Mlp((_Linear * 2)(first, second), third, shared)
        self.address = ctypes.addressof(self._struct)
