"""What the operator is told of weights that stay: their form, and where they lie.

Each table holds addresses of tensors and keeps those alive. The fields of the ``ctypes`` structures are those of the
structures of the same names in ``*.h`` and ``operator.cpp``.

Memory: a few addresses. Raises ``ValueError`` for sizes that do not go together.
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
    ] + [(name, ctypes.c_void_p) for name in ("up_bias", "down_bias")]


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
        self._biases_kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: list[tuple[Prepared, Prepared] | None] = [None] * count
        arrays = (*self._up, *self._down, self._widths, self._groups, *self._biases)
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
            ValueError: biases of another size or format.
        """
        self._kept[number] = (up, down)
        if biases is not None:
            self._biases_kept[number] = biases
            for array, bias, one in zip(self._biases, biases, (up, down), strict=True):
                array[number] = _row(bias, one.form.rows, torch.bfloat16)
        for (values, scales), one in ((self._up, up), (self._down, down)):
            values[number], scales[number] = one.values, one.scales
        self._widths[number], self._groups[number] = down.form.columns, down.form.group

    def remove(self, number: int) -> None:
        """It is not there any more."""
        self._kept[number] = None
        self._biases_kept.pop(number, None)
        for array in (*self._up, *self._down, *self._biases):
            array[number] = None


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
        *[(name, ctypes.c_int64) for name in ("up_kind", "down_kind", "slots", "columns")],
        ("up_group", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("prototypes", "target", "factor", "constants")],
        ("asked", ctypes.c_void_p),
        ("gate", _Gate),
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
        self.hidden = up.columns

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
    if constants.dtype != torch.float32 or not constants.is_contiguous():
        raise ValueError("constants are fp32 and contiguous")
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

Turn = Literal["halves", "split", "pairs-wide", "halves-wide", "not"]
_TURNS: tuple[Turn, ...] = ("halves", "split", "pairs-wide", "halves-wide", "not")  # attention.h


class _Turning:
    """What a table says of positions: how numbers of a head turn with each other, and which angles that takes.

    ============  ==================================================================  =====================
    halves        the first half with the second; every step rounded                  bf16, both halves
    split         neighbours; the first of each goes into the first half, the second  bf16, one half will do
                  into the second; every step rounded (deepseek_v3, rope_interleave)
    pairs-wide    neighbours, in their places; one rounding (deepseek_v2, ernie)      fp32, one half will do
    halves-wide   the first half with the second; one rounding (flex_olmo)            fp32, both halves
    not           nothing turns; positions are ignored, and may be ``None``           none
    ============  ==================================================================  =====================
    """

    def __init__(self, turn: Turn, turned: int) -> None:
        """At most ``turned`` numbers of a head."""
        self.turn: Turn = turn
        self.code, self.turned = _TURNS.index(turn), turned
        self._wide = turn in ("pairs-wide", "halves-wide")
        self._both = turn in ("halves", "halves-wide")

    def angles(self, positions: Positions | None) -> tuple[int | None, int | None, int]:
        """Addresses of cosines and sines, and how many numbers of a head turn.

        Raises:
            ValueError: angles that the table does not take.
        """
        if self.turn == "not":
            return None, None, 0
        if (
            positions is None
            or positions.wide is not self._wide
            or positions.count > self.turned
            or (self._both and not positions.both)
        ):
            raise ValueError(f"the operator does not take this: {positions!r} for {self.turn}")
        return positions.cos, positions.sin, positions.count


class _Attention(ctypes.Structure):
    _fields_: ClassVar = [
        *[("inputs", _Linear * 3), ("output", _Linear), ("gate", _Linear), ("norms", _Norm * 2)],
        *[(name, ctypes.c_int64) for name in ("heads", "groups", "width", "value_width")],
        *[("window", ctypes.c_int64), ("sinks", ctypes.c_void_p)],
        *[(name, ctypes.c_float) for name in ("scaling", "value_scale")],
        *[(name, ctypes.c_int32) for name in ("turn", "late", "doubled", "eager")],
    ]


class AttentionTable:
    """A layer's attention for ``Operator.attention``.

    Attributes:
        hidden: width of its activations.
        groups, width: heads of keys, and their width.
        cache: heads of the cache, width of a key and of a value there.
    """

    def __init__(
        self,
        linears: Sequence[tuple[Prepared, Tensor | None]],
        norms: Sequence[RmsNorm | None],
        width: int,
        scaling: float,
        *,
        turn: Turn = "halves",
        late: bool = False,
        value_width: int | None = None,
        value_scale: float = 1.0,
        window: int = 0,
        doubled: bool = False,
        gate: Prepared | None = None,
        eager: bool = False,
        sinks: Tensor | None = None,
    ) -> None:
        """Every argument is kept alive.

        Args:
            linears: matrix and bias (bf16 [R]) of queries, keys, values and the output.
            norms: of queries and of keys, over all heads or over each, as their columns say.
            width: of a head, in queries and keys.
            scaling: of the scores.
            turn: how rotary positions turn the numbers of a head (``_Turning``).
            late: norms come after the turn (hunyuan_v1_moe).
            value_width: of a head's values, where that is another.
            value_scale: of the values, before they go into the cache (mimo_v2_flash).
            window: how many tokens are looked at, the new one among them; 0 for all that the cache holds.
            doubled: the matrix of queries has for each head the rows of its query and then those of a gate; what
                attention gives is times the sigmoid of that (qwen3_next, qwen3_5_moe).
            gate: a matrix that gives such a gate of the layer's input (afmoe).
            eager: scores, their difference from the greatest, and probabilities are rounded to bf16, as
                ``eager_attention_forward`` of gpt_oss and mimo_v2_flash does.
            sinks: bf16 [heads], logits without values; with ``eager`` only.

        Raises:
            ValueError: sizes that do not go together.
        """
        query, key, value, output = [one.form for one, _ in linears]
        values = width if value_width is None else value_width
        heads, groups = query.rows // width // (1 + doubled), key.rows // width
        hidden = query.columns
        fits = query.rows == heads * width * (1 + doubled) and output.columns == heads * values
        fits = fits and key.rows == groups * width and value.rows == groups * values
        fits = fits and groups > 0 and heads > 0 and heads % groups == 0
        if not fits or {key.columns, value.columns, output.rows} != {hidden}:
            raise ValueError("queries, keys, values and output do not go together")
        for norm, rows in zip(norms, (heads * width, key.rows), strict=True):
            if norm is not None and norm.columns not in (rows, width):
                raise ValueError("a norm is neither over all heads nor over each")
        if doubled and (gate is not None or values != width):
            raise ValueError("a gate comes from the queries or from a matrix of its own")
        if gate is not None and (gate.form.rows, gate.form.columns) != (heads * values, hidden):
            raise ValueError("a gate of another size than what attention gives")
        if (sinks is not None and not eager) or window < 0:
            raise ValueError("sinks are of the eager kind, a window has a size")
        self.hidden, self.groups, self.width = hidden, groups, width
        self.cache = (groups, width, values)
        self.turning = _Turning(turn, width)
        self._kept = (linears, norms, gate, sinks)
        layers = [_linear(one, bias) for one, bias in linears]
        self.struct = _Attention(
            (_Linear * 3)(*layers[:3]),
            *(layers[3], _NO_MATRIX if gate is None else _linear(gate)),
            (_Norm * 2)(*[_NO_NORM if norm is None else norm.struct for norm in norms]),
            *(heads, groups, width, values, window, _row(sinks, heads, torch.bfloat16)),
            *(scaling, value_scale, self.turning.code, late, doubled, eager),
        )
        self.address = ctypes.addressof(self.struct)


class _Latent(ctypes.Structure):
    _fields_: ClassVar = [
        *[(name, _Linear) for name in ("compress_query", "query", "compress", "expand", "output")],
        *[(name, _Norm) for name in ("query_norm", "norm")],
        *[(name, ctypes.c_int64) for name in ("heads", "still", "turned", "value_width", "rank")],
        *[("scaling", ctypes.c_float), ("turn", ctypes.c_int32)],
    ]


class LatentTable:
    """A layer's attention over compressed keys and values (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    The cache is transformers' own: its keys are the compressed rows [1, 1, T, rank], its values the part of the keys
    that turns [1, 1, T, turned]. Nothing is expanded: queries are multiplied with the matrix of the keys, and what is
    added up with that of the values. The sums are those of transformers in another order and rounded less often, so
    results are close to transformers', not the same bits.

    Attributes: as of ``AttentionTable``.
    """

    def __init__(
        self,
        query: Prepared,
        compress: tuple[Prepared, Tensor | None],
        norm: RmsNorm,
        expand: Prepared,
        output: tuple[Prepared, Tensor | None],
        *,
        heads: int,
        turned: int,
        value_width: int,
        scaling: float,
        turn: Turn = "split",
        compress_query: tuple[Prepared, Tensor | None] | None = None,
        query_norm: RmsNorm | None = None,
    ) -> None:
        """Every argument is kept alive.

        Args:
            query: ``q_proj``, or ``q_b_proj`` behind ``compress_query`` and ``query_norm``.
            compress: ``kv_a_proj_with_mqa`` and its bias.
            norm: ``kv_a_layernorm``.
            expand: ``kv_b_proj``, not in int4.
            output: ``o_proj`` and its bias.
            heads: how many there are.
            turned: numbers of a head that turn, the last ones.
            value_width: of a head's values.
            scaling: of the scores.
            turn: how they turn (``_Turning``).
            compress_query, query_norm: ``q_a_proj`` with its bias, and ``q_a_layernorm``, where there are any.

        Raises:
            ValueError: sizes that do not go together, or a form that is not for this.
        """
        hidden, rank = compress[0].form.columns, norm.columns
        width = query.form.rows // heads
        still = width - turned
        asking = query if compress_query is None else compress_query[0]
        fits = query.form.rows == heads * width and compress[0].form.rows == rank + turned
        fits = fits and expand.form.rows == heads * (still + value_width) and still > 0
        fits = fits and expand.form.columns == rank and asking.form.columns == hidden
        fits = fits and output[0].form.columns == heads * value_width
        fits = fits and output[0].form.rows == hidden and turned % 2 == 0
        if compress_query is not None:
            fits = fits and compress_query[0].form.rows == query.form.columns
        if query_norm is not None:
            fits = fits and compress_query is not None and query_norm.columns == query.form.columns
        if not fits:
            raise ValueError("the matrices of a compressed attention do not go together")
        if expand.form.code == CODES["int4"]:
            raise ValueError("the matrix that expands keys and values is not taken in int4")
        self.hidden, self.cache = hidden, (1, rank, turned)
        self.turning = _Turning(turn, turned)
        self._kept = (query, compress, norm, expand, output, compress_query, query_norm)
        self.struct = _Latent(
            _NO_MATRIX if compress_query is None else _linear(*compress_query),
            *(_linear(query), _linear(*compress), _linear(expand), _linear(*output)),
            *(_NO_NORM if query_norm is None else query_norm.struct, norm.struct),
            *(heads, still, turned, value_width, rank, scaling, self.turning.code),
        )
        self.address = ctypes.addressof(self.struct)


class _Block(ctypes.Structure):
    _fields_: ClassVar = [
        *[("attention", _Attention), ("latent", ctypes.c_void_p)],
        *[(name, _Norm) for name in ("before", "attended", "after", "given")],
        *[("columns", ctypes.c_int64), ("multiplier", ctypes.c_float)],
    ]


class BlockTable:
    """What stands around a layer's attention and its experts, for ``block``, ``feed_forward`` and ``decoder``.

    With every step rounded to bf16 and norms that are ``None`` left out::

        s = x + attended(attention(before(x))) * multiplier
        y = s + given(experts(after(s))) * multiplier

    Attributes:
        hidden: width of the activations.
        attention: as given; ``None`` where the table is for ``feed_forward`` alone.
        between: for layers without router, as ``RouterTable.between``.
    """

    def __init__(
        self,
        attention: AttentionTable | LatentTable | None,
        before: RmsNorm | None,
        after: RmsNorm | None,
        *,
        attended: RmsNorm | None = None,
        given: RmsNorm | None = None,
        multiplier: float = 1.0,
        hidden: int | None = None,
    ) -> None:
        """Every argument is kept alive; ``hidden`` is needed where there are neither attention nor norms.

        Raises:
            ValueError: a norm of another width, or no width at all.
        """
        norms = (before, attended, after, given)
        widths = {one.columns for one in norms if one is not None}
        if attention is not None:
            widths.add(attention.hidden)
        if hidden is not None:
            widths.add(hidden)
        if len(widths) != 1:
            raise ValueError("a norm has another width than the layer")
        (self.hidden,) = widths
        self.attention = attention
        self._kept = norms
        latent = isinstance(attention, LatentTable)
        self._struct = _Block(
            *(attention.struct if isinstance(attention, AttentionTable) else _Attention(),),
            attention.address if latent else None,
            *[_NO_NORM if one is None else one.struct for one in norms],
            *(self.hidden, multiplier),
        )
        self.address = ctypes.addressof(self._struct)
        self.between, self.between_address, self._room = _between(self.hidden)


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


class _Router(ctypes.Structure):
    _fields_: ClassVar = [
        *[("linear", _Linear), ("correction", ctypes.c_void_p)],
        *[(name, ctypes.c_int64) for name in ("chosen", "groups", "kept")],
        *[(name, ctypes.c_float) for name in ("scaling", "epsilon", "least", "threshold")],
        *[(name, ctypes.c_int32) for name in ("scores", "pairs", "normed")],
        *[(name, ctypes.c_int32) for name in ("narrow", "exact", "stepwise")],
    ]


class _Between(ctypes.Structure):
    _fields_: ClassVar = [
        (name, ctypes.c_void_p) for name in ("sum", "normed", "logits", "gates", "slots")
    ]


Scores = Literal["softmax", "sigmoid", "top-softmax", "sparsemixer"]
_SCORES: tuple[Scores, ...] = ("softmax", "sigmoid", "top-softmax", "sparsemixer")  # as in router.h


class RouterTable:
    """A router for ``Operator.route``.

    In this order: logits W x + b; scores; ``correction`` is added, for the choice alone; of ``groups`` of neighbouring
    slots the ``kept`` best are left; the ``chosen`` greatest. Their scores are the gates, with ``normed`` divided by
    max(sum + ``epsilon``, ``least``); times ``scaling``.

    ===================================================  ==============================================================
    olmoe, qwen2_moe, qwen3_moe, qwen3_next, flex_olmo   ``normed`` as configured, ``narrow``
    mixtral, minimax                                     ``normed``
    granitemoe, gpt_oss (with ``bias``)                  ``scores="top-softmax"``, ``narrow``
    hunyuan_v1_moe                                       ``normed``, ``exact``
    ernie4_5_moe                                         ``normed``, ``narrow``, ``exact``, ``correction``, ``least``
    deepseek_v2                                          ``exact``, ``scaling``; "group_limited_greedy": groups
    deepseek_v3, glm4_moe, dots1, solar_open, exaone     ``scores="sigmoid"``, ``exact``, ``correction``, groups with
                                                         ``pairs``, ``normed``, ``epsilon=1e-20``, ``scaling``
    minimax_m2                                           ``scores="sigmoid"``, ``correction``, ``normed``
    afmoe                                                the same, ``epsilon=1e-20``, ``scaling``
    lfm2_moe                                             ``scores="sigmoid"``, ``correction``, ``stepwise``, ``narrow``,
                                                         ``normed``, ``epsilon=1e-6``, ``scaling``
    phimoe                                               ``scores="sparsemixer"``, ``jitter``, ``narrow``
    ===================================================  ==============================================================

    granitemoe gives its logits in fp32, of the same values.

    Attributes:
        slots, chosen, hidden: how many there are, how many a token gets, the width of its activations.
        gates, logits: their formats.
        between: what ``Operator.decoder`` found on the way to the experts, overwritten by the next call: the sum behind
            the attention, its norm (bf16 [1, H]), the slots (int64 [1, K]) and their gates.
    """

    def __init__(
        self,
        matrix: Prepared,
        chosen: int,
        normed: bool,
        narrow: bool,
        *,
        scores: Scores = "softmax",
        bias: Tensor | None = None,
        correction: Tensor | None = None,
        groups: int = 1,
        kept: int = 1,
        pairs: bool = False,
        scaling: float = 1.0,
        epsilon: float = 0.0,
        least: float = 0.0,
        jitter: float = 0.0,
        exact: bool = False,
        stepwise: bool = False,
    ) -> None:
        """``matrix``, ``bias`` and ``correction`` are kept alive.

        Args:
            matrix: [E, H].
            chosen: slots of a token, at most E.
            normed: whether gates are divided by their sum.
            narrow: whether they are bf16, else fp32.
            scores: "softmax" and "sigmoid" of the logits, all of them; "top-softmax" chooses by the logits, and gates
                are the softmax of those chosen; "sparsemixer" chooses two as Phi-3.5-MoE does (arXiv:2404.14219).
            bias: bf16 [E], of the logits.
            correction: fp32 [E].
            groups, kept: of slots; one group is none.
            pairs: a group is as good as the sum of its two greatest, else as its greatest.
            scaling, epsilon, least: as above.
            jitter: of "sparsemixer": logits within twice that are near.
            exact: logits are fp32; else they are rounded to bf16.
            stepwise: scores and each later step are rounded to bf16.

        Raises:
            ValueError: sizes or formats that do not go together.
        """
        form = matrix.form
        self.slots, self.chosen, self.hidden = form.rows, chosen, form.columns
        self.gates = torch.bfloat16 if narrow else torch.float32
        self.logits = torch.float32 if exact else torch.bfloat16
        if groups < 1 or not 1 <= kept <= groups or self.slots % groups:
            raise ValueError(f"{kept} of {groups} groups of {self.slots} slots")
        if not 1 <= chosen <= self.slots // groups * kept:
            raise ValueError(f"{chosen} of {self.slots} slots in {kept} of {groups} groups")
        if scores == "sparsemixer" and (chosen != 2 or exact or normed or groups > 1):
            raise ValueError("sparsemixer chooses two slots by logits in bf16, and nothing else")
        at_correction = _row(correction, self.slots, torch.float32)
        threshold = float(torch.tensor(2 * jitter, device="cpu").to(torch.bfloat16))
        self._struct = _Router(
            *(_linear(matrix, bias), at_correction, chosen, groups, kept),
            *(scaling, epsilon, least, threshold),
            *(_SCORES.index(scores), pairs, normed, narrow, exact, stepwise),
        )
        self.address = ctypes.addressof(self._struct)
        logits = torch.zeros(1, self.slots, dtype=self.logits, device="cpu")
        slots = torch.zeros(1, chosen, dtype=torch.int64, device="cpu")
        gates = torch.zeros(1, chosen, dtype=self.gates, device="cpu")
        self.between, self.between_address, room = _between(self.hidden, logits, slots, gates)
        self._kept = (matrix, bias, correction, room)


def _between(
    hidden: int,
    logits: Tensor | None = None,
    slots: Tensor | None = None,
    gates: Tensor | None = None,
) -> tuple[Between, int, object]:
    """Room for what stands between attention and experts, its address, and what has to be kept alive for it."""
    summed, normed = [torch.zeros(1, hidden, dtype=torch.bfloat16, device="cpu") for _ in range(2)]
    empty = torch.zeros(1, 0, device="cpu")
    found = Between(
        summed, normed, empty if slots is None else slots, empty if gates is None else gates
    )
    places = (summed, normed, logits, gates, slots)
    struct = _Between(*[None if one is None else one.data_ptr() for one in places])
    return found, ctypes.addressof(struct), (struct, logits)


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

    Addresses of the first head's, and how many numbers lie between two heads. ``sizes``: heads, width of a key and of a
    value, which have to be those of the table (``AttentionTable.cache``).
    """

    keys: int
    values: int
    key_step: int
    value_step: int
    held: int
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, held: int) -> Cached:
        """In ``keys`` and ``values`` [1, heads, room, width], whose rows are contiguous; they are not kept alive.

        Raises:
            ValueError: no room for one more, or tensors of another order or format.
        """
        _, heads, room, width = keys.shape
        _, others, other_room, value_width = values.shape
        for one in (keys, values):
            if one.dtype is not torch.bfloat16 or not one.is_cpu:
                raise ValueError(f"a cache in {one.dtype} on {one.device}")
        if keys.stride()[2:] != (width, 1) or values.stride()[2:] != (value_width, 1):
            raise ValueError(
                f"a cache whose rows are not contiguous: {keys.stride()}, {values.stride()}"
            )
        if not 0 <= held < min(room, other_room) or heads != others:
            raise ValueError(f"a cache with {held} of {room} tokens has no room")
        sizes = (heads, width, value_width)
        return cls(
            *(keys.data_ptr(), values.data_ptr(), keys.stride(1), values.stride(1), held, sizes)
        )


class Positions:
    """Where a token stands, as its layers are told: cosines and sines for the first ``count`` numbers of a head.

    ``wide``: they are fp32, else bf16. ``both``: they are there for both halves of those numbers, else once for two.
    """

    def __init__(self, cos: Tensor, sin: Tensor, count: int | None = None) -> None:
        """Contiguous, of one token; they are kept alive.

        Args:
            cos, sin: bf16 or fp32, ``count`` or half as many.
            count: how many numbers of a head turn; ``None`` for as many as there are cosines.

        Raises:
            ValueError: other tensors.
        """
        angles = cos.shape[-1]
        for one in (cos, sin):
            known = one.dtype is torch.bfloat16 or one.dtype is torch.float32
            if not known or not one.is_cpu or not one.is_contiguous() or one.numel() != angles:
                raise ValueError(f"angles {list(one.shape)} in {one.dtype} on {one.device}")
        self.count = angles if count is None else count
        if cos.dtype is not sin.dtype or self.count % 2 or self.count not in (angles, 2 * angles):
            raise ValueError(f"{angles} cosines and sines for {self.count} numbers")
        self._kept = (cos, sin)
        self.cos, self.sin = cos.data_ptr(), sin.data_ptr()
        self.wide, self.both = cos.dtype is torch.float32, self.count == angles

    @classmethod
    def of_half(cls, cos: Tensor, sin: Tensor) -> Positions:
        """For both halves, from cosines and sines of one (gpt_oss)."""
        return cls(torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))

    @classmethod
    def of_complex(cls, angles: Tensor) -> Positions:
        """Of complex numbers of size one, each for two neighbours (deepseek_v2): for "pairs-wide"."""
        return cls(angles.real.contiguous(), angles.imag.contiguous(), 2 * angles.shape[-1])

    def __repr__(self) -> str:
        return f"angles for {self.count} numbers in {'fp32' if self.wide else 'bf16'}"


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(_Prototypes, _Gate, _Layer, _Norm, _Linear, _Attention, _Latent, _Block, _Mlp),
    *(_Router, _Between),
)
"""All that C++ has as well; ``build.py`` makes the compiler compare them."""
