"""The levers: precision, reduction rate with scope, and the sizes that follow from them.

``record_parts``, ``scopes``, ``kept`` and ``spread`` are the one definition of these quantities: the
plan counts with them, the consolidation selects with them and the package is written with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conmoe_edge.checkpoint.format.forms import (
    DOWN,
    Kind,
    Part,
    best_kind,
    factored_parts,
    quantised_parts,
)
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.errors import UsageError
from conmoe_edge.model.anatomy import ExpertsAnatomy, ModelAnatomy

RATE_GRID = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
# Half of the experts is the most that is removed unasked: beyond it the published losses outweigh
# the speed.
AUTO_RATE_LIMIT = 0.5

FREE = "free"
"""Bits and neurons of every prototype as they are worth most, in bytes that are given as bits a weight."""

FREE_KINDS = ("int8", "q4", "q3-q4", "q3", "q2-q3", "q2")
"""What a prototype may be stored in then, the widest first. ``A-B``: gate and up in A, down in B."""

LOW_RANK = "lowrank"
"""Matrices as low rank and a few columns, in the checkpoint's own numbers: what ``mc-smoe`` writes, and only that."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How the numbers of the prototypes are stored, mildest first in ``PRECISIONS``.

    ``kinds`` are the record layouts of a package in this precision: one, or two where the
    prototypes that lose most by the second are stored in the first (mixed precision), or those of
    ``FREE_KINDS``, of which each prototype gets what it is worth.
    """

    name: str
    kinds: tuple[str, ...]

    @property
    def mixed(self) -> bool:
        """Whether there are records of two kinds, and the plan says how many of each."""
        return len(self.kinds) == 2

    @property
    def free(self) -> bool:
        """Whether only bytes are given, and each prototype gets the bits that it is worth in them."""
        return self.name == FREE


PRECISIONS = {
    **{
        name: Precision(name, tuple(name.split("+")))
        for name in (
            *("source", "mxfp4", "bf16", "bf16+int8", "int8", "int8+int4", "int4"),
            *("q4", "q3", "q2", LOW_RANK),
        )
    },
    FREE: Precision(FREE, FREE_KINDS),
}
_QUANTISED: dict[str, Kind] = {kind: kind for kind in ("int8", "int4", "mxfp4", "q4", "q3", "q2")}
_UNASKED = ("bf16", "int8", "int8+int4", "int4")
"""What is looked at beyond the checkpoint's own numbers when nothing was asked for."""


def precisions(anatomy: ModelAnatomy, asked: str) -> tuple[str, ...]:
    """The precisions to look at, mildest first: the one asked for, or all that need no asking.

    Of those, one that makes no record smaller than the milder ones do is left out. Experts that are MXFP4 or int4 in
    the checkpoint stay so: other numbers take more bytes or lose more (``docs/quantised-sources.md``).

    Raises:
        UsageError: MXFP4 was asked for, and the experts are not.
    """
    published = published_in(anatomy)
    if published is not None:
        return (published,) if asked in ("auto", "source") else (asked,)
    if asked == "mxfp4":
        raise UsageError(
            f"--precision mxfp4 is for experts that are published in MXFP4; those of {anatomy.architecture} are not.",
            "other numbers lose more in it than in int4, which fits its steps to them",
            "--precision int4",
        )
    if asked != "auto":
        return (asked,)
    found = ["source"]
    before = _record_sizes(anatomy, "source")
    for name in _UNASKED:
        kinds = PRECISIONS[name].kinds
        sizes = _record_sizes(anatomy, kinds[-1])
        milder_is_there = len(kinds) == 1 or kinds[0] in found
        if milder_is_there and any(one < other for one, other in zip(sizes, before, strict=True)):
            found.append(name)
            if not PRECISIONS[name].mixed:
                before = sizes
    return tuple(found)


def keeps_weights(anatomy: ModelAnatomy, precision: str) -> bool:
    """Whether a prototype in this precision is bit for bit the checkpoint's expert."""
    if precision == "source":
        return True
    if precision == published_in(anatomy):
        return True
    parts = [part for layer in anatomy.moe_layers if layer.experts for part in layer.experts.parts]
    return precision == "bf16" and all(part.dtype == "bfloat16" for part in parts)


def published_in(anatomy: ModelAnatomy) -> str | None:
    """``mxfp4`` or ``int4`` where all weight matrices of the routed experts are that in the checkpoint, and records
    hold their numbers as they are.
    """
    parts = [part for layer in anatomy.moe_layers if layer.experts for part in layer.experts.parts]
    matrices = [part for part in parts if len(part.shape) == 2]
    if matrices and all(part.form == "mxfp4" for part in matrices):
        return "mxfp4"
    return "int4" if matrices and all(part.grid is not None for part in matrices) else None


def record_parts(experts: ExpertsAnatomy, kind: str) -> tuple[Part, ...]:
    """The tensors of a record of one ``kind`` (a precision that is not mixed, or one of ``FREE_KINDS``) in order:
    name, shape, number format.

    A quantised or factored projection is [out, in] also where the module keeps it transposed, and
    has its scales or other parts behind it; a projection whose shape int4 cannot take is int8. In int4 one that is
    published in 4 bits has those.
    Biases are small and stay as they are.
    """
    parts: list[Part] = []
    for part in experts.parts:
        rows, columns = 0, 0
        if len(part.shape) == 2:
            rows, columns = reversed(part.shape) if experts.transposed else part.shape
        own = _kind_of(kind, part.name)
        if kind == "int4" and part.grid is not None and part.grid.takes(rows, columns):
            parts += quantised_parts(part.name, rows, columns, "grid4", part.grid)
        elif kind == LOW_RANK and columns:
            parts += factored_parts(part.name, rows, columns, part.dtype)
        elif own in _QUANTISED and columns:
            parts += quantised_parts(
                part.name, rows, columns, best_kind(rows, columns, _QUANTISED[own])
            )
        else:
            dtype = "bfloat16" if kind == "bf16" else part.dtype
            parts.append((part.name, part.shape, dtype))
    return tuple(parts)


def _kind_of(kind: str, name: str) -> str:
    """What a projection is stored in, in records of a kind."""
    inputs, _, down = kind.partition("-")
    return down if down and name == DOWN else inputs


def record_bytes(experts: ExpertsAnatomy, kind: str) -> int:
    """Bytes of one record."""
    return make_layout(record_parts(experts, kind)).nbytes


def shares_out(precision: str, rate: float, width: int) -> bool:
    """Whether layers get bytes of their own, by methods that divide them: not where every expert is kept and all have
    ``width`` neurons, where none goes, or in a mixed precision, whose division is the plan's.
    """
    if width:
        return False
    kind = PRECISIONS[precision]
    return kind.free or (rate > 0.0 and not kind.mixed)


def spread(total: int, counts: Sequence[int]) -> tuple[int, ...]:
    """``total`` wide records over scopes of ``counts`` prototypes: evenly, what is left to the
    first, none more than it has.

    More in all is never less in one scope.
    """
    given = [0] * len(counts)
    left = min(total, sum(counts))
    while left:
        open_scopes = [i for i, count in enumerate(counts) if given[i] < count]
        step = min(counts[i] - given[i] for i in open_scopes)
        step = min(step, left // len(open_scopes))
        if step == 0:
            for i in open_scopes[:left]:
                given[i] += 1
            break
        for i in open_scopes:
            given[i] += step
        left -= step * len(open_scopes)
    return tuple(given)


def scopes(anatomy: ModelAnatomy, size: int) -> tuple[tuple[int, ...], ...]:
    """Indices of the MoE layers that share prototypes, ``size`` neighbours at a time.

    Dense layers in between are skipped; layers whose experts differ in shape, number format or the grid of their 4 bits
    never share, however else the checkpoint stores them. The last scope of a run may be smaller.
    """
    runs: list[list[int]] = []
    previous: Sequence[tuple[object, ...]] | None = None
    for layer in anatomy.moe_layers:
        assert layer.experts is not None
        parts = [(part.name, part.shape, part.dtype, part.grid) for part in layer.experts.parts]
        if parts != previous:
            runs.append([])
        runs[-1].append(layer.index)
        previous = parts
    return tuple(
        tuple(run[start : start + size]) for run in runs for start in range(0, len(run), size)
    )


def kept(pool: int, rate: float) -> int:
    """Prototypes that stay of a pool: ``max(1, round((1 - rate) * pool))``."""
    return max(1, round((1.0 - rate) * pool))


def _record_sizes(anatomy: ModelAnatomy, kind: str) -> tuple[int, ...]:
    return tuple(record_bytes(layer.experts, kind) for layer in anatomy.moe_layers if layer.experts)
