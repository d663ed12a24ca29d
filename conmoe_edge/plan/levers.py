"""The levers: precision, reduction rate with scope, and the sizes that follow from them.

``record_bytes``, ``scopes`` and ``kept`` are the one definition of these quantities: the plan
counts with them, the consolidation selects with them and the package is written with them.
Raises ``UsageError`` for a lever set to nonsense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conmoe_edge.errors import UsageError
from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy, ModelAnatomy
from conmoe_edge.units import round_up

# A part starts on a cache line, as CPU kernels want it; a record is whole pages, so that it can be
# read past the cache.
PART_ALIGNMENT = 64
RECORD_ALIGNMENT = 4096

RATE_GRID = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
# Half of the experts is the most that is removed unasked: beyond it the published losses outweigh
# the speed.
AUTO_RATE_LIMIT = 0.5
# Larger scopes bring nothing that could be measured (docs/algorithm-conmoe.md: layer-local does as well), so
# they are opt-in.
AUTO_SCOPE = 1

# How mild a precision is: smaller comes first. ``None`` bits keep what the checkpoint has.
_TORCH_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True, slots=True)
class Precision:
    """How the numbers of a prototype are stored.

    ``bits`` a weight (``None``: the checkpoint's own), and ``scale_bytes`` for each group of
    ``group`` weights of a matrix row where the precision has scales (``group`` 0: none).
    """

    name: str
    bits: int | None
    group: int = 0
    scale_bytes: int = 0


PRECISIONS = {one.name: one for one in (Precision("source", None), Precision("bf16", 16))}


def precisions(anatomy: ModelAnatomy, asked: str) -> tuple[str, ...]:
    """The precisions to look at, mildest first: the one asked for, or all that need no asking."""
    if asked == "auto":
        widest = max(_TORCH_BITS.get(part.dtype, 0) for part in _all_parts(anatomy))
        return ("source", "bf16") if widest > 16 else ("source",)
    if asked not in PRECISIONS:
        names = ", ".join(PRECISIONS)
        raise UsageError(
            f"{asked!r} is not a precision.", f"there are auto, {names}", "--precision auto"
        )
    return (asked,)


def keeps_weights(anatomy: ModelAnatomy, precision: str) -> bool:
    """Whether a prototype in this precision is bit for bit the checkpoint's expert."""
    return precision == "source" or all(part.dtype == "bfloat16" for part in _all_parts(anatomy))


def part_bytes(part: ExpertPart, precision: str) -> int:
    """Bytes of one part of a record."""
    kind = PRECISIONS[precision]
    if kind.bits is None:
        return part.nbytes
    numel = math.prod(part.shape)
    rows = math.prod(part.shape[:-1])
    scales = rows * -(-part.shape[-1] // kind.group) * kind.scale_bytes if kind.group else 0
    return -(-numel * kind.bits // 8) + scales


def record_bytes(experts: ExpertsAnatomy, precision: str) -> int:
    """Bytes of one record: the parts in order, starts 64-aligned, the whole a multiple of 4096."""
    end = 0
    for part in experts.parts:
        end = round_up(end, PART_ALIGNMENT) + part_bytes(part, precision)
    return round_up(end, RECORD_ALIGNMENT)


def scopes(anatomy: ModelAnatomy, size: int) -> tuple[tuple[int, ...], ...]:
    """Indices of the MoE layers that share prototypes, ``size`` neighbours at a time.

    Dense layers in between are skipped; layers whose experts differ in shape never share. The last
    scope of a run may be smaller.
    """
    runs: list[list[int]] = []
    previous: tuple[ExpertPart, ...] | None = None
    for layer in anatomy.moe_layers:
        assert layer.experts is not None
        if layer.experts.parts != previous:
            runs.append([])
        runs[-1].append(layer.index)
        previous = layer.experts.parts
    return tuple(
        tuple(run[start : start + size]) for run in runs for start in range(0, len(run), size)
    )


def kept(pool: int, rate: float) -> int:
    """Prototypes that stay of a pool: ``max(1, round((1 - rate) * pool))``."""
    return max(1, round((1.0 - rate) * pool))


def check_rate(rate: float) -> float:
    """The rate itself, if it is one."""
    if not 0.0 <= rate < 1.0:
        raise UsageError(
            f"--rate {rate:g} is not a reduction rate.",
            "it is the share of the routed experts that is removed: at least 0, less than 1",
            f"--rate {rate / 100:g}" if 1.0 < rate < 100.0 else "--rate 0.25, or --rate auto",
        )
    return rate


def check_scope(scope: int) -> int:
    """The scope itself, if it is one."""
    if scope < 1:
        raise UsageError(
            f"--scope {scope} is not a scope.", "it is a number of layers, from 1", "--scope auto"
        )
    return scope


def _all_parts(anatomy: ModelAnatomy) -> tuple[ExpertPart, ...]:
    return tuple(
        part for layer in anatomy.moe_layers if layer.experts for part in layer.experts.parts
    )
