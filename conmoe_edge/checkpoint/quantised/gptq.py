"""GPTQ's packing, as AutoGPTQ, GPTQModel and auto-round write it.

Of a matrix [R, C]: ``X.qweight`` int32 [C * bits / 32, R] holds the numbers of a row one behind the other, ``X.scales``
[G, R] and ``X.qzeros`` int32 [G, R * bits / 32] have one for each row and group of columns, ``X.g_idx`` int32 [C] says
the group of each column. In the first version of the format zero points are stored one less than they are.

Two libraries disagree over a zero point of 0 there. GPTQModel subtracts one from the whole word, so the number above
lends; AutoGPTQ fills all numbers above with ones. Words that could be either are refused, except where GPTQModel says
that it wrote them. Scales may be below 0: auto-round's symmetric grids have such.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conmoe_edge.checkpoint.quantised.bit_fields import unpack, words_of
from conmoe_edge.checkpoint.quantised.grouped import (
    SCALES,
    check_scales,
    four_bits,
    group_of_columns,
    product,
)
from conmoe_edge.checkpoint.quantised.stored import PLAIN_VERSION, Headers, Logical
from conmoe_edge.checkpoint.quantised.word_settings import (
    WordSettings,
    gptq_settings,
    packing_in,
)
from conmoe_edge.errors import CheckpointError, UnsupportedModel

NAME = "gptq"
BIAS = "bias"
"""The part of a weight that is a bias without a place in the model (``zero_biases.py``)."""
_SUFFIX = ".qweight"


class Layout(NamedTuple):
    """Bits of a number, columns of a group, and what is declared."""

    bits: int
    group: int
    settings: WordSettings


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    return packing_in(settings) == "gptq"


def find(name: str, headers: Headers) -> Logical | None:
    """See ``forms.Form``; ``layout`` is a ``Layout``."""
    packing = packing_in(headers.declared) if name.endswith(_SUFFIX) else "none"
    if packing is None:
        raise UnsupportedModel(
            f"Nothing says how the numbers of {name} are packed.",
            "neither config.json nor a file beside it declares GPTQ, AWQ or auto-round",
            "Download the model with quantize_config.json or quant_config.json, which its tool has written.",
        )
    if packing != "gptq":
        return None
    settings = gptq_settings(headers.declared)
    base, one = name.removesuffix(_SUFFIX), headers.stored[name]
    scales = headers.partner(name, f"{base}.scales")
    zeros = headers.partner(name, f"{base}.qzeros", what="zero points")
    parts = {"values": name, "scales": scales, "zeros": zeros}
    order = f"{base}.g_idx"
    if order in headers.stored:
        parts["groups"] = order
    elif settings.ordered:
        headers.partner(name, order, what="groups of columns")
    shapes = [headers.stored[part].shape for part in (name, scales, zeros)]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or one.dtype != "int32":
        raise headers.odd(name, scales)
    if headers.stored[scales].dtype not in SCALES:
        raise headers.odd(name, scales)
    if headers.stored[zeros].dtype != "int32":
        raise headers.odd(name, zeros)
    index = headers.stored.get(order)
    if index is not None and (index.dtype != "int32" or len(index.shape) != 1):
        raise headers.odd(name, order)
    rows = shapes[1][1]
    columns = None if index is None else index.shape[0]
    found = {
        (bits, size, wide)
        for bits, group in settings.sizes
        if (wide := columns or shapes[0][0] * 32 // bits)
        and (size := min(group, wide) if group > 0 else wide)
        and shapes[0] == (words_of(wide, bits), rows)
        and shapes[1] == (-(-wide // size), rows)
        and shapes[2] == (-(-wide // size), words_of(rows, bits))
    }
    if len(found) != 1:
        raise headers.odd(name, zeros)
    ((bits, size, wide),) = found
    nbytes = headers.nbytes(*parts.values())
    layout = Layout(bits, size, settings)
    shape = (rows, wide)
    grid = None
    if bits == 4 and ("groups" not in parts or settings.ordered is False):
        dtype = headers.stored[scales].dtype
        grid = four_bits(wide, size, dtype, zeros=settings.symmetric is not True)
    return Logical(f"{base}.weight", headers.dtype, shape, NAME, nbytes, parts, layout, grid)


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """See ``forms.Form``."""
    bits, group, settings = logical.layout
    rows, columns = logical.shape
    if BIAS in parts:
        _check_zero(logical, parts[BIAS])
    check_scales(logical, parts["scales"], signed=True)
    zeros = _zero_points(logical, parts["zeros"], bits, rows, settings)  # [G, R]
    if settings.symmetric and bool((zeros != 1 << (bits - 1)).any()):
        raise CheckpointError(
            f"{logical.parts['zeros']} holds zero points that are not the middle.",
            "the settings say that these weights are symmetric, or name the wrong version of the format",
            PLAIN_VERSION,
        )
    groups: Tensor | int = group
    if "groups" in parts:
        order = group_of_columns(
            logical, "groups", parts["groups"], parts["scales"].shape[0], group
        )
        if order is not None and settings.ordered is False:
            raise logical.broken(
                "groups", "has an order of columns that desc_act says is not there"
            )
        groups = group if order is None else order
    numbers = unpack(parts["values"].T, bits, columns)
    return product(logical, numbers, zeros.T, parts["scales"].T, groups)


def _zero_points(
    logical: Logical, words: Tensor, bits: int, rows: int, settings: WordSettings
) -> Tensor:
    """uint8 [G, R] of int32 [G, words]."""
    numbers = unpack(words, bits, rows)
    if settings.plain_zeros:
        return numbers
    top = (1 << bits) - 1
    if not bool((numbers == top).any()):
        return numbers + 1
    if not settings.borrowed:
        raise logical.broken(
            "zeros", "holds zero points of 0, which tools store in different ways in this version"
        )
    if bits == 3:  # GPTQModel shifts each number by itself where numbers lie across words
        return (numbers + 1) & top
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return unpack((words.long() + ones).to(torch.int32), bits, rows)


def _check_zero(logical: Logical, bias: Tensor) -> None:
    """Refuse a bias that the model has no place for and that is none."""
    if bool((bias != 0).any()):
        raise CheckpointError(
            f"{logical.parts[BIAS]} is not zero, and has no place in the model.",
            "config.json describes a model without it, and every answer would be another one",
            PLAIN_VERSION,
        )
