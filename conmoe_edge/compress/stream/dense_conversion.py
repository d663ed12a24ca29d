"""The weights outside the routed experts on their way into the package: as they are, or in fewer bits.

``dense_sources`` says what is written; ``Dequantised`` reads it back under the model's own names, so that the receipt
judges the numbers that will run. Peak memory: one matrix as the checkpoint has it and as it is stored
(writing), as it is stored and in fp32 (reading). Raises ``CheckpointError`` where a tensor cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Kind, columns_of, quantised_parts
from conmoe_edge.checkpoint.format.quantise import Matrix, quantise, stored
from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE, quantised_forms
from conmoe_edge.checkpoint.tensors.tensor_reader import Lazy, LazyTensor, ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import TensorSource
from conmoe_edge.errors import CheckpointError


def dense_sources(
    tensors: Mapping[str, Lazy], keys: Sequence[str], forms: Mapping[str, Kind]
) -> list[TensorSource]:
    """What is written for ``keys``, in their order; those of ``forms`` become values and scales, rounded to nearest."""
    sources = []
    for key in keys:
        lazy = tensors[key]
        if key in forms:
            sources += _quantised_sources(lazy, forms[key])
        else:
            sources.append(TensorSource.of(lazy))
    return sources


def matrix_sources(name: str, matrix: Matrix) -> tuple[TensorSource, TensorSource]:
    """The two tensors of a matrix that is made already."""
    scales = matrix.scales
    assert scales is not None
    (values, values_dtype), (steps, scales_dtype) = _parts(matrix.rows, matrix.columns, matrix.kind)
    return (
        TensorSource(name, values_dtype, values, lambda: matrix.values),
        TensorSource(name + DENSE_SCALE, scales_dtype, steps, lambda: scales),
    )


def _quantised_sources(lazy: Lazy, kind: Kind) -> tuple[TensorSource, TensorSource]:
    rows, columns = lazy.shape
    (values, values_dtype), (steps, scales_dtype) = _parts(rows, columns, kind)
    kept: list[Tensor] = []

    def numbers() -> Tensor:
        matrix = quantise(sound(lazy.name, lazy[...]), kind)
        if matrix.scales is not None:
            kept[:] = [matrix.scales]
        return matrix.values

    def scales() -> Tensor:
        # In int8 they may be written first and far away, and a matrix is not kept in between: it is made twice.
        if not kept:
            numbers()
        return kept.pop()

    return (
        TensorSource(lazy.name, values_dtype, values, numbers),
        TensorSource(lazy.name + DENSE_SCALE, scales_dtype, steps, scales),
    )


def _parts(rows: int, columns: int, kind: Kind) -> list[tuple[tuple[int, ...], str]]:
    return [(shape, dtype) for _, shape, dtype in quantised_parts("weight", rows, columns, kind)]


def sound(name: str, weight: Tensor) -> Tensor:
    """``weight``, every number of which is one: a row's scale would carry a broken one into its neighbours, unseen.

    Raises:
        CheckpointError: one is not.
    """
    if not bool(weight.sum(dtype=torch.float32).isfinite()):
        raise CheckpointError(
            f"{name} holds NaN or infinity.",
            "nothing that is computed from it can be right",
            "download the model again; if it is the same afterwards, the model itself is broken",
        )
    return weight


class Dequantised(Mapping[str, "LazyTensor | LazyMatrix"]):
    """The tensors of a package by the model's own names, whatever form they are stored in."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._forms = quantised_forms(reader.index.tensors)
        scales = {name + DENSE_SCALE for name in self._forms}
        self._names = [name for name in reader if name not in scales]

    def __getitem__(self, name: str) -> LazyTensor | LazyMatrix:
        if name in self._forms:
            values, scales = self._reader[name], self._reader[name + DENSE_SCALE]
            return LazyMatrix(values, scales, self._forms[name])
        return self._reader[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LazyMatrix:
    """A quantised matrix that reads as fp32; like ``LazyTensor`` for transformers' loader."""

    __slots__ = ("_kind", "_scales", "_values")

    def __init__(self, values: LazyTensor, scales: LazyTensor, kind: Kind) -> None:
        self._values = values
        self._scales = scales
        self._kind: Kind = kind

    @property
    def shape(self) -> torch.Size:
        """As ``torch.Tensor.shape``."""
        rows = self._values.shape[0]
        return torch.Size([rows, columns_of(self._kind, self._values.shape)])

    @property
    def dtype(self) -> torch.dtype:
        """The type that a read gives."""
        return torch.float32

    def get_shape(self) -> list[int]:
        """As the slice object of safetensors has it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The format that a read gives, as the slice object of safetensors has it."""
        return "F32"

    def __getitem__(self, key: object) -> Tensor:
        whole = stored(self._kind, self._values[...], self._scales[...]).dequantise()
        return whole if key is ... else whole[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
