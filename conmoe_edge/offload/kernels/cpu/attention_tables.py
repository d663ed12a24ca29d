"""A layer's attention as the operator is told it, and for a token: where it stands and where its keys and values go."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import in_tiles
from conmoe_edge.model.kv_rows import row_bytes
from conmoe_edge.offload.kernels.cpu.structs import (
    _NO_MATRIX,
    _NO_NORM,
    Prepared,
    RmsNorm,
    Turn,
    _Linear,
    _linear,
    _Norm,
    _row,
)

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
            expand: ``kv_b_proj``, not in tiles.
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
        if in_tiles(expand.matrix.kind):
            raise ValueError("the matrix that expands keys and values is not taken in tiles")
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


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys and values of ``held`` tokens in memory that has room for one more: bf16 [heads, room, width], or rows of
    bytes [heads, room, row_bytes(width)] in int8 (``model/kv_rows.py``).

    Addresses of the first head's, and how many numbers lie between two heads. ``sizes``: heads, width of a key and of a
    value, which have to be those of the table (``AttentionTable.cache``).
    """

    keys: int
    values: int
    key_step: int
    value_step: int
    held: int
    sizes: tuple[int, int, int]
    packed: bool = False

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, held: int, widths: tuple[int, int] | None = None
    ) -> Cached:
        """In ``keys`` and ``values`` [1, heads, room, width], whose rows are contiguous; they are not kept alive.
        ``widths``: of a key and of a value, where they are rows of bytes.

        Raises:
            ValueError: no room for one more, or tensors of another order or format.
        """
        _, heads, room, width = keys.shape
        _, others, other_room, value_width = values.shape
        _, key_step, key_row, key_unit = keys.stride()
        _, value_step, value_row, value_unit = values.stride()
        wanted = torch.bfloat16 if widths is None else torch.int8
        if keys.dtype is not wanted or values.dtype is not wanted:
            raise ValueError(f"a cache in {keys.dtype} and {values.dtype}, not {wanted}")
        if not keys.is_cpu or not values.is_cpu or key_unit != 1 or value_unit != 1:
            raise ValueError(f"a cache on {keys.device}, strides {keys.stride()}")
        if key_row != width or value_row != value_width:
            raise ValueError(f"a cache whose rows are not contiguous: {keys.stride()}")
        if held < 0 or held >= room or held >= other_room or heads != others:
            raise ValueError(f"a cache with {held} of {room} tokens has no room")
        if widths is not None:
            if (width, value_width) != (row_bytes(widths[0]), row_bytes(widths[1])):
                raise ValueError(f"rows of {width} and {value_width} bytes for {widths} numbers")
            width, value_width = widths
        place = (keys.data_ptr(), values.data_ptr(), key_step, value_step, held)
        return cls(*place, (heads, width, value_width), widths is not None)

    @property
    def arguments(self) -> tuple[int, int, int, int, int, bool]:
        """What the operator's functions are told of it."""
        return (
            *(self.keys, self.values, self.key_step, self.value_step, self.held),
            self.packed,
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
