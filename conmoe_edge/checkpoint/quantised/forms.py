"""The forms that weights can be stored in, each in a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from conmoe_edge.checkpoint.quantised import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    fp8,
    gptq,
    mxfp4,
    nvfp4,
    packed_ints,
    plain_ints,
)
from conmoe_edge.checkpoint.quantised.stored import Headers, Logical


class Form(Protocol):
    """What a module of a form has."""

    @property
    def NAME(self) -> str:
        """As ``TensorFacts.form`` and plans call it."""
        ...

    def declares(self, settings: Mapping[str, Any]) -> bool:
        """Whether a quantisation with these settings, which are not empty, is of this form."""
        ...

    def find(self, name: str, headers: Headers) -> Logical | None:
        """The tensor whose values are stored as ``name``; ``None`` where they are not of this form.

        Raises:
            CheckpointError: parts are missing, or do not belong together.
            UnsupportedModel: a variant that is not read.
        """
        ...

    def expand(self, logical: Logical, parts: Mapping[str, Tensor]) -> Tensor:
        """One matrix [rows, columns] of ``logical`` in its dtype, of the parts of it.

        Of a stack [E, ...] the parts are those of one expert. Peak memory is that of the matrix in fp32.

        Raises:
            CheckpointError: scales are no numbers, or otherwise cannot be right.
        """
        ...


_ALL: tuple[Form, ...] = (
    mxfp4,
    nvfp4,
    fp8,
    packed_ints,
    plain_ints,
    gptq,
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    packed_ints,
    plain_ints,
    gptq,
    awq,
)
FORMS: Mapping[str, Form] = {one.NAME: one for one in _ALL}
