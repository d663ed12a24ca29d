"""How many bytes the model has outside the routed experts when its matrices there are stored in fewer bits.

``stored`` gives the anatomy that the plan counts with, to the byte as it is written. Norms and routers keep the
checkpoint's numbers (``model/linears.py`` says what counts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from conmoe_edge.checkpoint.format.dtypes import nbytes_of
from conmoe_edge.checkpoint.format.forms import DENSE_KINDS, dense_kind, quantised_parts
from conmoe_edge.errors import DoesNotFit
from conmoe_edge.model.anatomy import DenseMatrix, ModelAnatomy
from conmoe_edge.plan.kept import kept_by
from conmoe_edge.plan.record_options import bits_of_bytes

if TYPE_CHECKING:
    from conmoe_edge.plan.plan import Plan

DENSE_PRECISIONS = ("source", *DENSE_KINDS)
"""Mildest first."""

_FEW_BITS = {"q6": 4.0, "q4": 3.0}
"""Forms of the dense part -> bits a weight of the original's experts, below which it may be stored so unasked: experts
lose more with every bit there than attention does from 8 to 6 and from 6 to 4."""


def chosen_dense(anatomy: ModelAnatomy, plan_in: Callable[[str], Plan]) -> Plan:
    """The plan where the choice is left to it.

    The checkpoint's own numbers where everything fits in them; else 8 bits, which can hardly be measured; 6 and 4 bits
    where the experts would otherwise be left with less than 4 and 3 bits a weight. In all cases only where the bytes
    that this frees buy something: a model that fits at all, fewer experts removed, more bits, or more of them resident.

    Args:
        anatomy: of the model.
        plan_in: the plan with dense matrices in a precision.

    Raises:
        DoesNotFit: nothing fits, with what the narrowest needs.
    """
    best: Plan | None = None
    for precision in DENSE_PRECISIONS:
        try:
            found = plan_in(precision)
        except DoesNotFit:
            if best is None and precision == DENSE_PRECISIONS[-1]:
                raise
            continue
        if best is None or kept_by(found) > kept_by(best):
            best = found
        following = DENSE_PRECISIONS[DENSE_PRECISIONS.index(precision) + 1 :]
        enough = _FEW_BITS.get(following[0], float("inf")) if following else 0.0
        if best.unchanged or bits_of_bytes(anatomy, best.chosen.pool_bytes) >= enough:
            break
    assert best is not None, "the last one has raised"
    return best


def stored(anatomy: ModelAnatomy, precision: str) -> ModelAnatomy:
    """``anatomy`` with its dense bytes in ``precision``."""
    if precision not in DENSE_PRECISIONS:
        raise ValueError(f"{precision!r} is none of {DENSE_PRECISIONS}")
    if precision == anatomy.dense_precision:
        return anatomy
    if anatomy.dense_precision != "source":
        raise ValueError(f"these are the bytes in {anatomy.dense_precision} already")
    saved: dict[int | None, int] = {}
    for matrix in anatomy.dense_matrices:
        less = matrix.nbytes - _bytes_in(matrix, precision)
        saved[matrix.layer] = saved.get(matrix.layer, 0) + less
    layers = tuple(
        replace(layer, dense_bytes=layer.dense_bytes - saved.get(layer.index, 0))
        for layer in anatomy.layers
    )
    outside = anatomy.outside_bytes - saved.get(None, 0)
    return replace(anatomy, layers=layers, outside_bytes=outside, dense_precision=precision)


def _bytes_in(matrix: DenseMatrix, precision: str) -> int:
    rows, columns = matrix.rows, matrix.columns
    kind = dense_kind(
        rows, columns, DENSE_KINDS[precision], in_rows=matrix.in_rows, at_an_end=matrix.at_an_end
    )
    return sum(
        nbytes_of(dtype, shape) for _, shape, dtype in quantised_parts("", rows, columns, kind)
    )
