"""AWQ's packing, as AutoAWQ and auto-round write it: 4 bits, eight numbers in a word.

Of a matrix [R, C], in the order ``gemm``: ``X.qweight`` int32 [C, R / 8], ``X.qzeros`` int32 [G, R / 8] and
``X.scales`` [G, R]; a word has the numbers of eight rows in the order 0, 2, 4, 6, 1, 3, 5, 7. In the order ``gemv``:
``X.qweight`` int32 [R, C / 8], ``X.qzeros`` int32 [R, words] and ``X.scales`` [R, 8 * words], numbers one behind the
other, and zeros behind the last group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.quantised.bit_fields import unpack
from conmoe_edge.checkpoint.quantised.grouped import SCALES, check_scales, four_bits, product
from conmoe_edge.checkpoint.quantised.stored import Headers, Logical
from conmoe_edge.checkpoint.quantised.word_settings import awq_settings, packing_in

NAME = "awq"
_SUFFIX = ".qweight"
_IN_A_WORD = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word the number of each of eight rows lies."""


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    return packing_in(settings) == "awq"


def find(name: str, headers: Headers) -> Logical | None:
    """See ``forms.Form``; ``layout`` is the columns of a group and whether the order is ``gemv``."""
    if not name.endswith(_SUFFIX) or packing_in(headers.declared) != "awq":
        return None
    settings = awq_settings(headers.declared)
    base, one = name.removesuffix(_SUFFIX), headers.stored[name]
    scales = headers.partner(name, f"{base}.scales")
    zeros = headers.partner(name, f"{base}.qzeros", what="zero points")
    other, third = headers.stored[scales], headers.stored[zeros]
    if any(len(part.shape) != 2 or 0 in part.shape for part in (one, other, third)):
        raise headers.odd(name, scales)
    if one.dtype != "int32" or other.dtype not in SCALES:
        raise headers.odd(name, scales)
    if settings.by_columns:
        rows, columns = one.shape[0], one.shape[1] * _IN_A_WORD
    else:
        rows, columns = one.shape[1] * _IN_A_WORD, one.shape[0]
    sizes = {group if group > 0 else columns for _, group in settings.sizes}
    fitting = [
        size for size in sizes if _fits(settings.by_columns, other.shape, rows, columns, size)
    ]
    if len(fitting) != 1:
        raise headers.odd(name, scales)
    if third.dtype != "int32" or third.shape != (
        other.shape[0],
        other.shape[1] // _IN_A_WORD,
    ):
        raise headers.odd(name, zeros)
    parts = {"values": name, "scales": scales, "zeros": zeros}
    nbytes, layout = headers.nbytes(*parts.values()), (fitting[0], settings.by_columns)
    return Logical(
        *(f"{base}.weight", headers.dtype, (rows, columns), NAME, nbytes, parts, layout),
        grid=four_bits(columns, fitting[0], other.dtype, zeros=True),
    )


def _fits(by_columns: bool, scales: tuple[int, ...], rows: int, columns: int, size: int) -> bool:
    if columns % size:
        return False
    groups = columns // size
    if not by_columns:
        return scales == (groups, rows)
    return scales[0] == rows and scales[1] >= groups and scales[1] % _IN_A_WORD == 0


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """See ``forms.Form``."""
    size, by_columns = logical.layout
    rows, columns = logical.shape
    groups = columns // size
    if by_columns:
        scales = parts["scales"][:, :groups]
        zeros = unpack(parts["zeros"], 4, groups)
        numbers = unpack(parts["values"], 4, columns)
    else:
        scales = parts["scales"].T
        zeros = _in_order(unpack(parts["zeros"], 4, rows)).T
        numbers = _in_order(unpack(parts["values"], 4, rows)).T
    check_scales(logical, scales)
    return product(logical, numbers, zeros, scales, size)


def _in_order(numbers: Tensor) -> Tensor:
    """Numbers as words hold them, [n, R], to the order of the rows."""
    places = torch.tensor(_PLACES)
    return numbers.unflatten(1, (-1, _IN_A_WORD)).index_select(2, places).flatten(1)
