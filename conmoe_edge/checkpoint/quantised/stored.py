"""What headers say of a checkpoint, and what a tensor of the plain checkpoint is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from conmoe_edge.checkpoint.format.forms import Grid
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import CheckpointError, UnsupportedModel

PLAIN_VERSION = "name a version of it in 16 or 32 bit, or in a form of docs/quantised-sources.md"
"""What helps where a form is not read."""


class Stored(NamedTuple):
    """What a header says of one tensor of the file; ``dtype`` is torch's name."""

    dtype: str
    nbytes: int
    shape: tuple[int, ...]


def stored_in(index: CheckpointIndex) -> dict[str, Stored]:
    """The tensors of a checkpoint on this disk."""
    return {name: Stored(e.torch_name, e.nbytes, e.shape) for name, e in index.tensors.items()}


Peek = Callable[[str], bytes]
"""Name -> the bytes of that tensor; only small ones are asked for."""
MOST_PEEKED = 4096
"""Bytes of the largest tensor that is read to understand the others."""


@dataclass(frozen=True, slots=True)
class Headers:
    """What a form decides from.

    Attributes:
        stored: all tensors of the checkpoint.
        declared: the settings of its quantisation; empty where no file has any.
        dtype: torch's name of the format that quantised tensors are expanded to.
        peek: reads the values of small tensors; ``None`` where only headers are at hand.
        known: what forms have found out of shapes and settings.
    """

    stored: Mapping[str, Stored]
    declared: Mapping[str, Any]
    dtype: str
    peek: Peek | None = None
    known: dict[Any, Any] = field(default_factory=dict, compare=False)
    _first: dict[tuple[str, Stored], str] = field(default_factory=dict, compare=False)
    _peeked: dict[str, bytes] = field(default_factory=dict, compare=False)

    def first_like(self, name: str) -> str:
        """The first tensor with the header of ``name`` whose name differs in numbers alone: the same of another layer
        or expert. What is read of it is a guess for all of them, and has to be checked when they are expanded.
        """
        if not self._first:
            for one, header in self.stored.items():
                self._first.setdefault((re.sub(r"\d+", "*", one), header), one)
        return self._first[re.sub(r"\d+", "*", name), self.stored[name]]

    def values_of(self, name: str) -> bytes:
        """The bytes of a small tensor.

        Raises:
            CheckpointError: it is not small, or cannot be read.
            UnsupportedModel: only headers are at hand.
        """
        if self.stored[name].nbytes > MOST_PEEKED:
            raise CheckpointError(
                f"The tensor {name} has {self.stored[name].nbytes} bytes.",
                f"it says how a weight is quantised, for which {MOST_PEEKED} are enough",
                PLAIN_VERSION,
            )
        if self.peek is None:
            raise UnsupportedModel(
                f"How {name} and its kin are quantised is written in their values.",
                "only the headers of the model are at hand",
                "download it first: fit --keep-source",
            )
        if name not in self._peeked:
            self._peeked[name] = self.peek(name)
        return self._peeked[name]

    def partner(self, name: str, *candidates: str, what: str = "scales") -> str:
        """The one of ``candidates`` that there is: the scales of ``name``, or ``what`` else belongs to it.

        Raises:
            CheckpointError: none, or more than one.
        """
        stored = self.stored
        there = [one for one in candidates if one in stored]
        if len(there) == 1:
            return there[0]
        if there:
            raise CheckpointError(
                f"{name} has {what} twice: {there[0]} and {there[1]}.",
                "which of them is meant cannot be known",
                PLAIN_VERSION,
            )
        raise CheckpointError(
            f"The {what} of {name} are missing.",
            f"there is no {' or '.join(candidates)}; without them every number of it is wrong",
            "Download the model again; if it is the same afterwards, the model itself is broken.",
        )

    def nbytes(self, *names: str) -> int:
        """Bytes of these tensors in the file."""
        stored = self.stored
        return sum([stored[name].nbytes for name in names])

    def odd(self, name: str, other: str) -> CheckpointError:
        """For two tensors whose formats or shapes do not fit together."""
        said = [
            f"{one} is {self.stored[one].dtype} {list(self.stored[one].shape)}"
            for one in (name, other)
        ]
        return CheckpointError(
            f"{name} and its scales do not belong together.", ", ".join(said), PLAIN_VERSION
        )


@dataclass(frozen=True, slots=True)
class Logical:
    """One tensor of the plain checkpoint.

    Attributes:
        name, dtype, shape: as a read gives it; ``dtype`` is torch's name.
        form: the name of the form that it is stored in; ``plain`` where it is a tensor of the file.
        nbytes: bytes that it takes in the checkpoint, scales included.
        parts: names of the tensors of the file that it is made of, by what they are (``values``, ``scales``, ...).
        layout: what else its form knows of it, such as the size of a block.
        grid: where its numbers lie, if records can hold them as they are (``format/grids.py``).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: str
    nbytes: int
    parts: Mapping[str, str]
    layout: Any = None
    grid: Grid | None = None

    def broken(self, part: str, what: str) -> CheckpointError:
        """For values of a part that no quantised weight has."""
        return CheckpointError(
            f"{self.parts[part]} {what}.",
            f"the weights of {self.name} cannot be right",
            "Download the model again; if it is the same afterwards, the model itself is broken.",
        )
