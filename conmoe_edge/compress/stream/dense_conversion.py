"""The weights outside the routed experts on their way into the package: as they are, or linear layers in int8.

``dense_sources`` says what is written; ``Dequantised`` reads it back under the model's own names, so that the receipt
judges the numbers that will run. Peak memory: one matrix as the checkpoint has it and in int8 (writing), in int8 and
in fp32 (reading). Raises ``CheckpointError`` where a tensor cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import quantised_parts
from conmoe_edge.checkpoint.format.quantise import Matrix, quantise, stored
from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE, quantised_names
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy, LazyTensor, ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource
from conmoe_edge.errors import CheckpointError


def dense_sources(
    tensors: Mapping[str, Lazy], keys: Sequence[str], in_int8: frozenset[str]
) -> list[TensorSource]:
    """What is written for ``keys``, in their order; those of ``in_int8`` become values and scales.

    Scales and values may be written far from each other, and a matrix is not kept in between: it is read twice.
    """
    sources = []
    for key in keys:
        lazy = tensors[key]
        if key in in_int8:
            sources += _int8_sources(lazy)
        else:
            sources.append(TensorSource.of(lazy))
    return sources


def _int8_sources(lazy: Lazy) -> tuple[TensorSource, TensorSource]:
    name = lazy.name
    rows, columns = lazy.shape
    (_, values, values_dtype), (_, scales, scales_dtype) = quantised_parts(
        name, rows, columns, "int8"
    )
    return (
        TensorSource(name, values_dtype, values, lambda: _quantised(lazy).values),
        TensorSource(name + DENSE_SCALE, scales_dtype, scales, lambda: _scales(lazy)),
    )


def _quantised(lazy: Lazy) -> Matrix:
    weight = lazy[...]
    # A row's scale would carry one broken number into all of its neighbours, unseen.
    if not bool(weight.sum(dtype=torch.float32).isfinite()):
        raise CheckpointError(
            f"{lazy.name} holds NaN or infinity.",
            "nothing that is computed from it can be right",
            "download the model again; if it is the same afterwards, the model itself is broken",
        )
    return quantise(weight, "int8")


def _scales(lazy: Lazy) -> Tensor:
    scales = _quantised(lazy).scales
    assert scales is not None
    return scales


class Dequantised(Mapping[str, "LazyTensor | LazyMatrix"]):
    """The tensors of a package by the model's own names, whatever form they are stored in."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._quantised = frozenset(quantised_names(reader.index.tensors))
        scales = {name + DENSE_SCALE for name in self._quantised}
        self._names = [name for name in reader if name not in scales]

    def __getitem__(self, name: str) -> LazyTensor | LazyMatrix:
        if name in self._quantised:
            return LazyMatrix(self._reader[name], self._reader[name + DENSE_SCALE])
        return self._reader[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LazyMatrix:
    """A matrix stored in int8 that reads as fp32; like ``LazyTensor`` for transformers' loader."""

    __slots__ = ("_scales", "_values")

    def __init__(self, values: LazyTensor, scales: LazyTensor) -> None:
        self._values = values
        self._scales = scales

    @property
    def shape(self) -> torch.Size:
        """As ``torch.Tensor.shape``."""
        return self._values.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type that a read gives."""
        return torch.float32

    def get_shape(self) -> list[int]:
        """As the slice object of safetensors has it."""
        return self._values.get_shape()

    def get_dtype(self) -> str:
        """The format that a read gives, as the slice object of safetensors has it."""
        return "F32"

    def __getitem__(self, key: object) -> Tensor:
        whole = stored("int8", self._values[...], self._scales[...]).dequantise()
        return whole if key is ... else whole[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
