"""What the kernels read of prototypes and layers: tensors on the device, written once, but for where records lie.

Memory: eight numbers a prototype, a few a router slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import (
    DOWN,
    LOW_BITS,
    MX_BLOCK,
    SCALE,
    UP,
    columns_of,
    in_tiles,
    kind_of,
)
from conmoe_edge.checkpoint.format.manifest import RecordLayout, RecordPart
from conmoe_edge.model.slot_tensors import SlotTensors

KINDS = {
    **{"bfloat16": 0, "float16": 1, "int8": 3, "int4": 4, "mxfp4": 5},
    **{"q4": 6, "q3": 7, "q2": 8},
}
"""Number format of a plain weight, or form of another -> what the kernels call it. fp32, q6, grid4: torch."""
HALVES = (KINDS["int4"], KINDS["mxfp4"])
"""Two numbers to a byte, of different rows."""
PLANES = {KINDS[kind]: bits for kind, bits in LOW_BITS.items() if kind in KINDS}
"""Numbers in planes of bits (``low_bits.py``) -> bits of a number."""
_TILE = 64
_ALIGNED = 16
"""Numbers that the rows of every matrix are a multiple of, so that they are read 16 bytes at a time."""


@dataclass(frozen=True, slots=True)
class GpuForm:
    """Where the two matrices of an expert lie in its record.

    Attributes:
        kinds: of gate and up rows together, and of down rows, which may differ.
        values, scales: byte offsets of both; 0 for no scales.
        hidden, width: numbers of a token, of neurons.
        groups: columns that share a scale in int4 and mxfp4; 0 in other forms.
    """

    kinds: tuple[int, int]
    values: tuple[int, int]
    scales: tuple[int, int]
    hidden: int
    width: int
    groups: tuple[int, int]

    @classmethod
    def of(cls, layout: RecordLayout) -> GpuForm | None:
        """``None`` for an expert that has more than the two matrices, or has them in another form."""
        parts = {part.name: part for part in layout.parts}
        if not {UP, DOWN} <= set(parts) <= {UP, DOWN, UP + SCALE, DOWN + SCALE}:
            return None
        pair = [parts[name] for name in (UP, DOWN)]
        scales = [parts.get(name + SCALE) for name in (UP, DOWN)]
        sides = [_side(part, one) for part, one in zip(pair, scales, strict=True)]
        if sides[0] is None or sides[1] is None:
            return None
        rows = [part.shape[0] for part in pair]
        columns = [side[1] for side in (sides[0], sides[1])]
        if columns[0] != rows[1] or rows[0] != 2 * columns[1]:
            return None
        return cls(
            kinds=(sides[0][0], sides[1][0]),
            values=(pair[0].offset, pair[1].offset),
            scales=(_offset(scales[0]), _offset(scales[1])),
            hidden=rows[1],
            width=columns[1],
            groups=(sides[0][2], sides[1][2]),
        )


def _side(part: RecordPart, scales: RecordPart | None) -> tuple[int, int, int] | None:
    """Kind, columns and group of one matrix; ``None`` where the kernels do not take it."""
    pair = None if scales is None else (scales.dtype, scales.shape)
    kind = kind_of((part.dtype, part.shape), pair)
    if kind is None or len(part.shape) != 2:
        return None
    code = KINDS.get(part.dtype if kind == "plain" else kind)
    columns = part.shape[1] if kind == "plain" else columns_of(kind, part.shape)
    if code is None or columns % _ALIGNED or (in_tiles(kind) and part.shape[0] % _TILE):
        return None
    if kind == "int4" and scales is not None:
        return code, columns, columns // scales.shape[0]
    return code, columns, MX_BLOCK if kind == "mxfp4" else 0


def _offset(part: RecordPart | None) -> int:
    return 0 if part is None else part.offset


class GpuTable:
    """The prototypes of a package.

    Attributes:
        forms: by number; ``None`` where the kernels do not take one.
        base: int64 [P], addresses of the records that are on the device.
        values, scales, groups: int64 [2, P], of gate and up rows, and of down rows.
        widths: int64 [P].
        asked: int64 [1], how many prototypes were computed with in layers that do not tell.
    """

    def __init__(
        self, layouts: Sequence[RecordLayout], layout_of: Sequence[int], device: torch.device
    ) -> None:
        """``layout_of``: the layout of every prototype."""
        forms = [GpuForm.of(layout) for layout in layouts]
        self.forms = [forms[layout] for layout in layout_of]
        empty = GpuForm((0, 0), (0, 0), (0, 0), 0, 0, (0, 0))
        each = [form or empty for form in self.forms]

        def both(name: str) -> Tensor:
            columns = [getattr(form, name) for form in each]
            return (
                torch.tensor(columns, dtype=torch.int64, device=device).view(-1, 2).T.contiguous()
            )

        self.values, self.scales, self.groups = both("values"), both("scales"), both("groups")
        self.widths = torch.tensor([one.width for one in each], dtype=torch.int64, device=device)
        self.base = torch.zeros(len(each), dtype=torch.int64, device=device)
        self.asked = torch.zeros(1, dtype=torch.int64, device=device)

    def put(self, number: int, address: int) -> None:
        """The prototype's record is at ``address``, for what is issued from now on."""
        self.base[number].fill_(address)


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """A layer's map and what its prototypes have in common.

    Attributes:
        table: of the package.
        slots: the layer's map, on the device.
        kinds: of its prototypes' matrices.
        hidden: numbers of a token.
        width: neurons of its widest prototype.
        steps: the smallest group of columns of its matrices in int4 and mxfp4; 0 for other kinds.
    """

    table: GpuTable
    slots: SlotTensors
    kinds: tuple[int, int]
    hidden: int
    width: int
    steps: tuple[int, int]

    @property
    def quantised(self) -> bool:
        """Whether both matrices have scales, and are [out, in] whatever the module's own order is."""
        return all(kind >= KINDS["int8"] for kind in self.kinds)

    @classmethod
    def of(cls, table: GpuTable, slots: SlotTensors) -> GpuLayer | None:
        """``None`` where its prototypes are not all of one kind that the kernels take.

        Raises:
            ValueError: a prototype that is not in the table, or constants of another width.
        """
        numbers = slots.slot_map.prototypes
        if not all(number < len(table.forms) for number in numbers):
            raise ValueError(f"layer {slots.slot_map.layer} names a prototype that is not there")
        forms = [form for number in numbers if (form := table.forms[number]) is not None]
        alike = len({(form.kinds, form.hidden) for form in forms}) == 1
        if len(forms) != len(numbers) or not alike:
            return None
        if slots.constants is not None and slots.constants.shape[1] != forms[0].hidden:
            raise ValueError(f"a constant of layer {slots.slot_map.layer} has another width")
        steps = [min(form.groups[side] for form in forms) for side in (0, 1)]
        return cls(
            table=table,
            slots=slots,
            kinds=forms[0].kinds,
            hidden=forms[0].hidden,
            width=max(form.width for form in forms),
            steps=(steps[0], steps[1]),
        )
