"""bitsandbytes' LLM.int8(): whole numbers of a byte, and the largest value of each row, which 127 stands for.

``X.weight`` int8 [R, C], ``X.SCB`` fp32 [R], and ``X.weight_format``, which must say that rows are stored as rows. The
library expands. Which columns of activations it would keep in 16 bits is no matter of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.quantised.stored import PLAIN_VERSION, Headers, Logical
from conmoe_edge.errors import UnsupportedModel

NAME = "bitsandbytes-int8"
_ROWS = 0
"""The code of rows in ``weight_format``; the others were for old GPUs."""


def declares(settings: Mapping[str, Any]) -> bool:
    """See ``forms.Form``."""
    return settings.get("quant_method") == "bitsandbytes"


def find(name: str, headers: Headers) -> Logical | None:
    """An int8 weight with its ``SCB``."""
    one = headers.stored[name]
    scales = f"{name.removesuffix('weight')}SCB"
    if one.dtype != "int8" or not name.endswith(".weight") or scales not in headers.stored:
        return None
    other = headers.stored[scales]
    if len(one.shape) != 2 or 0 in one.shape or other.dtype != "float32":
        raise headers.odd(name, scales)
    if math.prod(other.shape) != one.shape[0]:
        raise headers.odd(name, scales)
    parts = {"values": name, "scales": scales}
    form = f"{name}_format"
    if form in headers.stored:
        parts["format"] = form
        if headers.stored[form].dtype != "uint8":
            raise headers.odd(name, form)
        like = f"{headers.first_like(name)}_format"
        if any(headers.values_of(like if like in headers.stored else form)):
            raise UnsupportedModel(
                f"{name} is not stored row by row.",
                f"{form} names a layout that older versions of bitsandbytes had for some GPUs",
                PLAIN_VERSION,
            )
    nbytes = headers.nbytes(*parts.values())
    return Logical(name, headers.dtype, one.shape, NAME, nbytes, parts)


def expand(logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
    """The library's own expansion in fp32, rounded once."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    values, scales = parts["values"], parts["scales"].reshape(-1)
    if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
        raise logical.broken("scales", "holds NaN, infinity or a number below 0")
    if not bool(scales.any()) and bool(values.any()):
        raise logical.broken("scales", "holds nothing but zeros")
    if "format" in parts and bool((parts["format"] != _ROWS).any()):
        raise logical.broken("format", "says that rows are not stored as rows")
    return int8_vectorwise_dequant(values, scales).to(getattr(torch, logical.dtype))
