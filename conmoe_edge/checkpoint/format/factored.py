"""A weight matrix [R, C] (rows are outputs) as low rank and a few columns:

    W = left right + the columns ``kept`` at the places ``columns``, 0 elsewhere.

==========  ===========================  =======================================================
part        shape                        in a record under the weight's name and
==========  ===========================  =======================================================
left        [R, r]                       ``.left``
right       [r, C]                       ``.right``
kept        [R, k]                       ``.kept``
columns     int32 [k], ascending         ``.columns``
==========  ===========================  =======================================================

``forms.factored_sizes`` says what r and k are. A product needs no expanding:
W x = left (right x) + kept x[columns]. Such records are what the method ``mc-smoe`` writes.

Peak memory: nothing but the matrix that ``expand`` gives, in fp32 and in the format asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.forms import COLUMNS, KEPT, LEFT, RIGHT


@dataclass(frozen=True, slots=True)
class Factors:
    """The parts of one factored matrix."""

    left: Tensor
    right: Tensor
    kept: Tensor
    columns: Tensor

    def product(self, x: Tensor) -> Tensor:
        """[n, C] -> [n, R], in the format of ``x``."""
        linear, dtype = nn.functional.linear, x.dtype
        y = linear(linear(x, self.right.to(dtype)), self.left.to(dtype))
        return y.add_(linear(x.index_select(-1, self.columns), self.kept.to(dtype)))

    def expand(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [R, C]."""
        wide = self.left.float() @ self.right.float()
        return wide.index_add_(1, self.columns, self.kept.float()).to(dtype)

    def named(self, name: str) -> dict[str, Tensor]:
        """The parts as a record of the weight ``name`` has them."""
        return {
            name + LEFT: self.left,
            name + RIGHT: self.right,
            name + KEPT: self.kept,
            name + COLUMNS: self.columns,
        }


def factors_of(parts: Mapping[str, Tensor], name: str) -> Factors:
    """The weight ``name`` among the parts of a record; shares the record's memory."""
    return Factors(*(parts[name + suffix] for suffix in (LEFT, RIGHT, KEPT, COLUMNS)))
