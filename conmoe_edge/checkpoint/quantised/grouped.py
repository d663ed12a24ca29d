"""Whole numbers times the scale of their group, as the libraries of integer quantisation multiply them.

value = (number - zero) * scale. The product is rounded once to the format of the scales, as compressed-tensors,
GPTQModel, AutoAWQ and auto-round take it, and then to the format of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import Grid
from conmoe_edge.checkpoint.quantised.stored import Logical

SCALES = frozenset({"float32", "bfloat16", "float16"})
"""Formats that scales may have."""
_HELD = ("float16", "bfloat16")
"""Formats of scales that records can have, too."""
_GROUPS = (128, 64, 32, 16)
"""Columns that share a scale in a record where more do in the file: activations are rounded with one scale for each."""
_AT_ONCE = 1 << 20
"""Numbers that are multiplied at a time."""


def four_bits(columns: int, group: int, scales: str, *, zeros: bool) -> Grid | None:
    """How a record holds numbers of 4 bits as they are; ``None`` where it cannot.

    Args:
        columns: of the matrix.
        group: those that share a scale, one after another.
        scales: their format.
        zeros: whether groups have zero points of their own.
    """
    if scales not in _HELD or columns % group or group % _GROUPS[-1]:
        return None
    size = group if group <= _GROUPS[0] else next(one for one in _GROUPS if group % one == 0)
    return Grid(size, scales, zeros)


def check_scales(logical: Logical, scales: Tensor, signed: bool = False) -> None:
    """Refuse scales that no quantisation gives; ``signed`` where a negative one is none of them.

    Raises:
        CheckpointError: one is NaN, infinite, or negative.
    """
    if not bool(scales.isfinite().all()):
        raise logical.broken("scales", "holds NaN or infinity")
    if not signed and bool((scales < 0).any()):
        raise logical.broken("scales", "holds a scale below 0")


def product(
    logical: Logical, numbers: Tensor, zeros: Tensor | int, scales: Tensor, groups: Tensor | int
) -> Tensor:
    """The matrix [R, C] of ``logical`` in its dtype.

    Args:
        logical: names the fault where there is one.
        numbers: uint8 or int8 [R, C].
        zeros: [R, G], or one for all.
        scales: [R, G].
        groups: columns of a group, or the group of each column, int64 [C].

    Raises:
        CheckpointError: a scale is 0 and its numbers are not, or a product is beyond the format of the scales or of
            the model.
    """
    rows, columns = numbers.shape
    out = torch.empty(rows, columns, dtype=getattr(torch, logical.dtype))
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scale = _spread(scales[part].float(), groups, columns)
        wide = numbers[part].float()
        if isinstance(zeros, int):
            wide -= zeros
        else:
            wide -= _spread(zeros[part].float(), groups, columns)
        if bool(((scale == 0) & (wide != 0)).any()):
            raise logical.broken("scales", "holds a scale of 0 for numbers that are not 0")
        wide *= scale
        out[part] = wide.to(scales.dtype)
        if not bool(out[part].isfinite().all()):
            raise logical.broken("scales", f"holds a scale that is too large for {logical.dtype}")
    return out


def _spread(one: Tensor, groups: Tensor | int, columns: int) -> Tensor:
    """[r, G] to a value for each column, [r, C] or [r, 1]."""
    if isinstance(groups, Tensor):
        return one.index_select(1, groups)
    return one if one.shape[1] == 1 else one.repeat_interleave(groups, 1)[:, :columns]


def group_of_columns(
    logical: Logical, part: str, index: Tensor, count: int, most: int
) -> Tensor | None:
    """The group of each column as a file has it, int64 [C]; ``None`` where columns lie in the order of their groups.

    Args:
        logical, part: name the fault where there is one.
        index: int32 [C].
        count: groups that there are.
        most: columns that a group may have.

    Raises:
        CheckpointError: a group is not there, or has more columns than a group has.
    """
    groups = index.long()
    if bool(((groups < 0) | (groups >= count)).any()):
        raise logical.broken(part, f"names a group that is not one of the {count}")
    if bool((torch.bincount(groups, minlength=count) > most).any()):
        raise logical.broken(part, f"has more than {most} columns in a group")
    plain = torch.arange(len(groups)) // most
    return None if torch.equal(groups, plain) else groups
