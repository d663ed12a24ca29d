"""The weights of a scope's experts while it is being consolidated.

The layer that has just run is in memory; the earlier layers of a scope lie as records in the run's work folder, so that
never more than one layer is held. ``ScopeWeights`` reads both in runs of rows for ``weight_distance.py``, and gives
single experts back for the prototype file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.layout import PAGE
from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.checkpoint.format.records import encode, pack, view
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.checkpoint.package.record_headers import record_name
from conmoe_edge.checkpoint.tensors.tensor_index import index_files
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.checkpoint.tensors.tensor_writer import write_records
from conmoe_edge.memory.heap import trimmed
from conmoe_edge.model.experts import part_names


@dataclass(frozen=True, slots=True)
class MatrixView:
    """Where one of gate, up, down lies in the fused parameter of an expert: some rows, some columns of it."""

    part: str
    first_row: int
    row_step: int
    rows: int
    columns: slice
    values: int


def matrix_views(module: nn.Module) -> dict[str, MatrixView]:
    """The matrices of one expert of this module by name, whatever way gate and up are fused."""
    views = {}
    names = part_names(module)
    everything = slice(None)
    if "gate_up_proj" in names:
        rows, columns = _shape(module, "gate_up_proj")
        halves = zip(("gate", "up"), (0, 1), strict=True)
        for name, half in halves:
            if module.is_transposed:
                width = columns // 2
                part = (
                    slice(half * width, (half + 1) * width)
                    if module.is_concatenated
                    else slice(half, None, 2)
                )
                views[name] = MatrixView("gate_up_proj", 0, 1, rows, part, width)
            else:
                count = rows // 2
                first, step = (half * count, 1) if module.is_concatenated else (half, 2)
                views[name] = MatrixView("gate_up_proj", first, step, count, everything, columns)
    else:
        rows, columns = _shape(module, "up_proj")
        views["up"] = MatrixView("up_proj", 0, 1, rows, everything, columns)
    rows, columns = _shape(module, "down_proj")
    views["down"] = MatrixView("down_proj", 0, 1, rows, everything, columns)
    return views


def _shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Rows and columns of one expert's part of a fused parameter."""
    tensor: Tensor = getattr(module, name)
    return tensor.shape[1], tensor.shape[2]


class LayerWeights(Protocol):
    """All experts of one layer."""

    experts: int

    def part_rows(self, part: str, start: int, stop: int) -> Tensor:
        """[E, stop - start, columns] of a fused parameter."""
        ...

    def parts(self, expert: int) -> Mapping[str, Tensor]:
        """One expert's tensors by parameter name."""
        ...


class LoadedLayer:
    """A layer whose experts module is in memory."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = {
            name: getattr(module, name).detach() for name in part_names(module)
        }
        self.experts = next(iter(self._tensors.values())).shape[0]

    def part_rows(self, part: str, start: int, stop: int) -> Tensor:
        """[E, stop - start, columns], a view."""
        return self._tensors[part][:, start:stop]

    def parts(self, expert: int) -> Mapping[str, Tensor]:
        """One expert's tensors, views."""
        return {name: tensor[expert] for name, tensor in self._tensors.items()}


class ScratchLayer:
    """A layer whose experts lie as records in a file of the work folder."""

    def __init__(self, path: Path, layout: RecordLayout) -> None:
        index = index_files(path.parent, [path.name])
        self._reader = ShardReader(index)
        self._entries = sorted(index.tensors.values(), key=lambda entry: entry.offset)
        self._layout = layout
        self._part = {part.name: part for part in layout.parts}
        self.experts = len(self._entries)

    def part_rows(self, part: str, start: int, stop: int) -> Tensor:
        """[E, stop - start, columns], read from the file."""
        place = self._part[part]
        row = place.nbytes // place.shape[0]
        dtype = getattr(torch, place.dtype)
        runs = [
            self._reader.read(entry, place.offset + start * row, (stop - start) * row).view(dtype)
            for entry in self._entries
        ]
        return torch.stack(runs).view(self.experts, stop - start, *place.shape[1:])

    def parts(self, expert: int) -> Mapping[str, Tensor]:
        """One expert's tensors, read from the file."""
        entry = self._entries[expert]
        return view(self._layout, self._reader.read(entry, 0, entry.nbytes))

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self) -> ScratchLayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ScopeWeights:
    """The experts of a whole scope in the order (layer, expert), as ``weight_distance.py`` reads them."""

    def __init__(self, layers: Mapping[int, LayerWeights], views: Mapping[str, MatrixView]) -> None:
        self._layers = dict(sorted(layers.items()))
        self._views = views
        self._ids = [
            ExpertId(index, expert)
            for index, layer in self._layers.items()
            for expert in range(layer.experts)
        ]

    @property
    def experts(self) -> int:
        """Experts in the scope."""
        return len(self._ids)

    def layer(self, index: int) -> LayerWeights:
        """Those of one layer."""
        return self._layers[index]

    def matrices(self) -> tuple[str, ...]:
        """Names of the compared matrices."""
        return tuple(self._views)

    def rows(self, matrix: str) -> tuple[int, int]:
        """(rows, values per row) of a matrix of one expert."""
        place = self._views[matrix]
        return place.rows, place.values

    def read(self, matrix: str, start: int, stop: int) -> Tensor:
        """[P, stop - start, values]."""
        place = self._views[matrix]
        runs = []
        for layer in self._layers.values():
            first = place.first_row - place.first_row % place.row_step
            lo, hi = first + start * place.row_step, first + stop * place.row_step
            rows = layer.part_rows(place.part, lo, hi)[
                :, place.first_row % place.row_step :: place.row_step
            ]
            runs.append(rows[..., place.columns])
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def read_one(self, matrix: str, expert: int) -> Tensor:
        """[rows, values] of one expert."""
        place = self._views[matrix]
        found = self._ids[expert]
        tensor = self._layers[found.layer].parts(found.expert)[place.part]
        last = place.first_row + place.rows * place.row_step
        return tensor[place.first_row : last : place.row_step][:, place.columns]

    def parts(self, expert: ExpertId) -> Mapping[str, Tensor]:
        """One expert's tensors by parameter name."""
        return self._layers[expert.layer].parts(expert.expert)


def write_experts(
    path: Path,
    records: Sequence[tuple[ExpertId, RecordLayout]],
    parts_of: Callable[[ExpertId], Mapping[str, Tensor]],
    *,
    transposed: bool,
    made: Callable[[ExpertId], Mapping[str, Matrix]] | None = None,
) -> WrittenFile:
    """Experts as records, each in the forms of its layout; one buffer for all, one expert quantised at a time.

    ``made``: weights that are in these forms already. It and ``parts_of`` are called for one expert after another.
    """
    # Large records lie on pages, so what is no number of pages comes last.
    records = sorted(records, key=lambda one: one[1].nbytes % PAGE != 0)
    sizes = {record_name(expert): layout.nbytes for expert, layout in records}
    buffer = torch.empty(max(sizes.values()), dtype=torch.uint8)

    def packed():
        for expert, layout in trimmed(records):
            own = None if made is None else made(expert)
            tensors = encode(layout, parts_of(expert), transposed, own)
            yield record_name(expert), pack(layout, tensors, buffer[: layout.nbytes])

    return write_records(path, sizes, packed())
