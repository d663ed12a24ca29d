"""How many bytes the model has outside the routed experts when its matrices there are stored in fewer bits.

``stored`` gives the anatomy that the plan counts with, to the byte as it is written. Norms and routers keep the
checkpoint's numbers (``model/linears.py`` says what counts).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from conmoe_edge.checkpoint.format.dtypes import nbytes_of
from conmoe_edge.checkpoint.format.forms import DENSE_KINDS, dense_kind, quantised_parts
from conmoe_edge.model.anatomy import DenseMatrix, ModelAnatomy

if TYPE_CHECKING:
    pass

DENSE_PRECISIONS = ("source", *DENSE_KINDS)
"""Mildest first."""


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
