"""What is looked at in a record before anything computes with it, each time one has been read.

The numbers of columns that a factored weight keeps (``factored.py``): they say which inputs are read, so each of them
must be one. And the scales of quantised weights: one that is NaN or infinite makes a whole row or group so. Scales in
E8M0 have one number that is NaN, 255, and none that is infinite. In the forms of ``low_bits.py`` the pairs of the rows
can be none; the bytes behind them cannot.

Both are a small part of a record (a few hundredths in int4, thousandths in int8), and looking at them costs about a
hundredth of reading it. All other values are left to ``inspect --verify``, and to the check of what the model says.

Memory: nothing beside the record. Raises nothing: the caller knows the file.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import (
    COLUMNS,
    LOW_BITS,
    LOW_HEAD,
    RIGHT,
    SCALE,
    kind_of,
)
from conmoe_edge.checkpoint.format.manifest import RecordLayout, RecordPart

_SIGN = 0x8000
"""The bit of a number's sign. Read as whole numbers without a sign, numbers below zero follow those above."""
_INFINITE = {"bfloat16": 0x7F80, "float16": 0x7C00}
"""Number format of scales -> the least bits without the sign that are infinity or NaN."""
_NOT_ONE = 255
"""NaN in E8M0."""


class RecordCheck:
    """The check of records of one layout."""

    def __init__(self, layout: RecordLayout) -> None:
        parts = {part.name: part for part in layout.parts}
        self._scales = [
            (part, part.offset + part.nbytes)
            for name, part in parts.items()
            if name.endswith(SCALE) and part.dtype in _INFINITE and part.nbytes
        ]
        """Parts that are such numbers or, in few bits, begin with pairs in bf16; and where those end."""
        self._scales += [
            (part, part.offset + LOW_HEAD * part.shape[1])
            for name, part in parts.items()
            if name.endswith(SCALE) and _in_few_bits(parts.get(name.removesuffix(SCALE)), part)
        ]
        self._exponents = [
            part
            for name, part in parts.items()
            if name.endswith(SCALE) and part.dtype == "float8_e8m0fnu" and part.nbytes
        ]
        self._columns: list[tuple[RecordPart, int]] = []
        for name, part in parts.items():
            right = parts.get(name.removesuffix(COLUMNS) + RIGHT)
            if name.endswith(COLUMNS) and part.dtype == "int32" and right is not None:
                self._columns.append((part, right.shape[-1]))

    def wrong(self, record: Tensor) -> str:
        """What is wrong with a record uint8 [record bytes] on the host; empty where nothing is."""
        if not self._scales and not self._exponents and not self._columns:
            return ""
        raw = record.numpy()
        for part, end in self._scales:
            infinite = _INFINITE.get(part.dtype, _INFINITE["bfloat16"])
            if _any_is_none(raw[part.offset : end], infinite):
                return f"{part.name} holds NaN or infinity"
        for part in self._exponents:
            if int(raw[part.offset : part.offset + part.nbytes].max()) == _NOT_ONE:
                return f"{part.name} holds NaN"
        for part, width in self._columns:
            columns = raw[part.offset : part.offset + part.nbytes].view(np.int32)
            if len(columns) and not (
                columns[0] >= 0 and columns[-1] < width and bool((columns[1:] > columns[:-1]).all())
            ):
                return f"{part.name} are not ascending columns of {width}"
        return ""


def _any_is_none(raw: np.ndarray, infinite: int) -> bool:
    """Whether 16-bit numbers have one whose bits without the sign are ``infinite`` or more. Largest values alone are
    asked for, which needs no room: this is done for each record that an answer waits for.
    """
    largest = int(raw.view(np.uint16).max())
    if largest < infinite:  # and none is below zero
        return False
    return largest >= _SIGN | infinite or int(raw.view(np.int16).max()) >= infinite


def _in_few_bits(values: RecordPart | None, scales: RecordPart) -> bool:
    if values is None:
        return False
    return kind_of((values.dtype, values.shape), (scales.dtype, scales.shape)) in LOW_BITS
