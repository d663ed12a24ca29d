"""How many bytes the model has outside the routed experts when its matrices there are stored in fewer bits.

``stored`` gives the anatomy that the plan counts with, to the byte as it is written. Norms and routers keep the
checkpoint's numbers (``model/linears.py`` says what counts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from conmoe_edge.checkpoint.format.dtypes import nbytes_of
from conmoe_edge.checkpoint.format.forms import DENSE_KINDS, Kind, dense_kind, quantised_parts
from conmoe_edge.model.anatomy import DenseMatrix, ModelAnatomy

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


def stored_matrices(anatomy: ModelAnatomy, precision: str) -> Iterator[tuple[DenseMatrix, Kind]]:
    """The matrices outside the routed experts and how each is stored in ``precision``: plain in ``source``."""
    for matrix in anatomy.dense_matrices:
        yield matrix, "plain" if precision == "source" else _kind_in(matrix, precision)


def read_by_kind(anatomy: ModelAnatomy) -> dict[str, int]:
    """Bytes outside the routed experts that one token reads, by the kind that they are stored in; what is not in fewer
    bits is ``source``. The embedding table is looked up, not read, unless it is also the head.
    """
    precision = anatomy.dense_precision
    found = {"source": anatomy.dense_bytes}
    table, of_table, head = 0, "source", 0
    for matrix, kind in stored_matrices(anatomy, precision):
        nbytes = matrix.nbytes if kind == "plain" else _bytes_in(matrix, precision)
        if kind != "plain":
            found["source"] -= nbytes
            found[kind] = found.get(kind, 0) + nbytes
        if matrix.looked_up:
            table, of_table = nbytes, "source" if kind == "plain" else kind
        head += matrix.at_an_end and not matrix.looked_up
    size = 4 if anatomy.dtype in ("float32", "float64") else 2
    whole = anatomy.vocab_size * anatomy.hidden_size * size
    if not table:  # it does more than look up, or nothing is known of single matrices
        table, of_table = whole, "source"
    if head or anatomy.outside_bytes >= table + whole:
        found[of_table] -= table
    return found


def _kind_in(matrix: DenseMatrix, precision: str) -> Kind:
    wished = DENSE_KINDS[precision]
    shape = matrix.rows, matrix.columns
    return dense_kind(*shape, wished, in_rows=matrix.in_rows, at_an_end=matrix.at_an_end)


def _bytes_in(matrix: DenseMatrix, precision: str) -> int:
    rows, columns = matrix.rows, matrix.columns
    kind = _kind_in(matrix, precision)
    return sum(
        nbytes_of(dtype, shape) for _, shape, dtype in quantised_parts("", rows, columns, kind)
    )
