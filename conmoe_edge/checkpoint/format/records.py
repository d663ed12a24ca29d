"""Records: one expert as one run of bytes, so that it is one read, one copy and one cache slot.

``layout.py`` says where each part lies; here ``encode`` brings an expert into the forms of a layout
and ``decode`` brings it back, ``pack`` writes tensors into a record, and ``view`` looks at the bytes
of one as typed tensors without copying. Padding is zero, so equal experts give equal bytes.

Peak memory: the record itself; one expert in the form or dtype asked for. Raises ``ValueError`` for
tensors that do not match the layout, which is a mistake of the caller; damaged layouts on disk are
caught by ``manifest_io``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from conmoe_edge.checkpoint.format.dtypes import CODES
from conmoe_edge.checkpoint.format.factored import factors_of
from conmoe_edge.checkpoint.format.forms import (
    COLUMNS,
    KEPT,
    LEFT,
    RIGHT,
    SCALE,
    Grid,
    Kind,
    grid_of,
    kind_of,
)
from conmoe_edge.checkpoint.format.manifest import RecordLayout, RecordPart
from conmoe_edge.checkpoint.format.quantise import Matrix, quantise, stored
from conmoe_edge.checkpoint.format.torch_dtype import torch_dtype


def encode(
    layout: RecordLayout,
    weights: Mapping[str, torch.Tensor],
    transposed: bool,
    made: Mapping[str, Matrix] | None = None,
) -> dict[str, torch.Tensor]:
    """One expert in the forms of a layout.

    Args:
        layout: which weights are quantised (those with scales) and the number format of the others.
        weights: the expert's tensors by parameter name, as its module keeps them; of factored
            weights their parts, since only a method can make those.
        transposed: whether that is [in, out]; a quantised weight is [out, in] always.
        made: weights that are in the form of the layout already, by parameter name.
    """
    parts = {part.name: part for part in layout.parts}
    found: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        if name + SCALE in parts:
            matrix = None if made is None else made.get(name)
            if matrix is None:
                weight = weights[name].T if transposed else weights[name]
                matrix = quantise(weight, form_of(layout, name), _grid(parts, name))
            assert matrix.scales is not None
            found[name], found[name + SCALE] = matrix.values, matrix.scales
        elif name not in found:
            found[name] = weights[name].to(_dtype(part))
    return found


def form_of(layout: RecordLayout, name: str) -> Kind:
    """The form of the weight ``name`` in records of a layout.

    Raises:
        ValueError: none that is known.
    """
    parts = {part.name: part for part in layout.parts}
    part, scales = parts[name], parts.get(name + SCALE)
    pair = None if scales is None else (scales.dtype, scales.shape)
    kind = kind_of((part.dtype, part.shape), pair)
    if kind is None:
        raise ValueError(f"{name} is {part.dtype} with scales: no form that is known")
    return kind


def _grid(parts: Mapping[str, RecordPart], name: str) -> Grid | None:
    part, scales = parts[name], parts[name + SCALE]
    return grid_of((part.dtype, part.shape), (scales.dtype, scales.shape))


def decode(
    parts: Mapping[str, torch.Tensor], dtype: torch.dtype, transposed: bool
) -> dict[str, torch.Tensor]:
    """One expert's tensors by parameter name, as a module keeps them: quantised and factored weights
    in ``dtype``, everything else as it is.
    """
    found = {}
    for name, tensor in parts.items():
        if name.endswith((SCALE, RIGHT, KEPT, COLUMNS)):
            continue
        if name.endswith(LEFT):
            weight = name.removesuffix(LEFT)
            wide = factors_of(parts, weight).expand(dtype)
            found[weight] = wide.T if transposed else wide
        elif name + SCALE in parts:
            wide = matrix_of(parts, name).dequantise(dtype)
            found[name] = wide.T if transposed else wide
        else:
            found[name] = tensor
    return found


def matrix_of(parts: Mapping[str, torch.Tensor], name: str) -> Matrix:
    """The weight ``name`` among the parts of a record, in its stored form; shares the record's memory."""
    scales = parts.get(name + SCALE)
    if scales is None:
        return stored("plain", parts[name], None)
    formats = [(str(one.dtype).removeprefix("torch."), one.shape) for one in (parts[name], scales)]
    kind = kind_of(*formats)
    if kind is None:
        raise ValueError(f"{name} is {parts[name].dtype} with scales in {scales.dtype}")
    return stored(kind, parts[name], scales)


def pack(
    layout: RecordLayout, tensors: Mapping[str, torch.Tensor], out: torch.Tensor | None = None
) -> torch.Tensor:
    """Copy the parts into one record.

    Args:
        layout: where each part goes.
        tensors: one tensor per part, of the part's shape and dtype, on any device and with any
            strides.
        out: uint8 ``[nbytes]`` to fill, such as a buffer that is used again and again; a new one by
            default.

    Returns:
        The record, uint8 ``[nbytes]``.
    """
    if set(tensors) != {part.name for part in layout.parts}:
        raise ValueError(
            f"the record holds {[part.name for part in layout.parts]}, got {sorted(tensors)}"
        )
    for part in layout.parts:
        tensor = tensors[part.name]
        if tuple(tensor.shape) != part.shape or tensor.dtype != _dtype(part):
            raise ValueError(
                f"{part.name} is {tensor.dtype} {list(tensor.shape)}, "
                f"the record holds {part.dtype} {list(part.shape)}"
            )
    record = torch.empty(layout.nbytes, dtype=torch.uint8) if out is None else out
    for start, stop in _gaps(layout):
        record[start:stop].zero_()
    for name, target in view(layout, record).items():
        target.copy_(tensors[name])
    return record


def view(layout: RecordLayout, record: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a record uint8 ``[nbytes]`` as contiguous tensors that share its memory."""
    if record.dtype != torch.uint8 or record.shape != (layout.nbytes,):
        raise ValueError(
            f"a record is uint8 [{layout.nbytes}], got {record.dtype} {list(record.shape)}"
        )
    return {
        part.name: record[part.offset : part.offset + part.nbytes]
        .view(_dtype(part))
        .view(part.shape)
        for part in layout.parts
    }


def _dtype(part: RecordPart) -> torch.dtype:
    return torch_dtype(CODES[part.dtype], part.name)


def _gaps(layout: RecordLayout) -> Iterable[tuple[int, int]]:
    """The padding between the parts and after the last one."""
    end = 0
    for part in layout.parts:
        yield end, part.offset
        end = part.offset + part.nbytes
    yield end, layout.nbytes
