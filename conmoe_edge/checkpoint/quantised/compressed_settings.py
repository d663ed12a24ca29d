"""What compressed-tensors declares of the weights that it stores as whole numbers.

Several groups of layers may have settings of their own. Which layer belongs to which is not taken from their patterns
of names: the shapes of a layer's tensors have to fit the settings of one group alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conmoe_edge.checkpoint.quantised.stored import PLAIN_VERSION
from conmoe_edge.errors import UnsupportedModel

METHOD = "compressed-tensors"
BITS = range(2, 9)


@dataclass(frozen=True, slots=True)
class IntWeights:
    """How one group of layers stores its weights.

    Attributes:
        bits: of a number.
        group: columns that share a scale; 0 for a whole row, -1 for the whole matrix.
        symmetric: there are no zero points.
        ordered: columns may belong to groups in any order.
    """

    bits: int
    group: int
    symmetric: bool
    ordered: bool

    def columns_of(self, columns: int) -> int:
        """Columns that share a scale in a matrix of ``columns``."""
        return self.group if self.group > 0 else columns

    def scales_fit(self, shape: tuple[int, ...], rows: int, columns: int) -> bool:
        """Whether scales of this shape belong to a matrix [rows, columns]."""
        if self.group < 0:
            return shape in ((), (1,), (1, 1))
        if self.group == 0:
            return shape in ((rows,), (rows, 1))
        return columns % self.group == 0 and shape == (rows, columns // self.group)


def has_format(declared: Mapping[str, Any], layout: str) -> bool:
    """Whether compressed-tensors declares the format ``layout``, for all layers or for a group of them."""
    if declared.get("quant_method") != METHOD:
        return False
    return any(one.get("format") == layout for one in (declared, *_groups(declared)))


def int_weights(declared: Mapping[str, Any]) -> tuple[IntWeights, ...]:
    """The settings of all groups of layers with whole numbers, each once.

    Raises:
        UnsupportedModel: settings are not understood.
    """
    found: dict[IntWeights, None] = {}
    for one in _groups(declared):
        weights = one.get("weights")
        if isinstance(weights, Mapping) and str(weights.get("type", "int")).lower() == "int":
            found[_read(weights)] = None
    return tuple(found)


def _groups(declared: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = declared.get("config_groups")
    values = groups.values() if isinstance(groups, Mapping) else ()
    return [one for one in values if isinstance(one, Mapping)]


def _read(weights: Mapping[str, Any]) -> IntWeights:
    bits, group = weights.get("num_bits", 8), weights.get("group_size")
    symmetric, order = weights.get("symmetric", True), weights.get("actorder")
    strategy = weights.get("strategy")
    if strategy is None:  # as the library takes it
        strategy = {None: "tensor", -1: "channel"}.get(group, "group")
    sizes = {"tensor": -1, "channel": 0, "group": group if type(group) is int else 0}
    size = sizes.get(strategy, 0) if isinstance(strategy, str) else 0
    known = strategy in ("tensor", "channel") or (strategy == "group" and size > 0)
    known = known and type(bits) is int and bits in BITS and type(symmetric) is bool
    if not known:
        raise UnsupportedModel(
            "compressed-tensors declares weights in a way that is not read here "
            f"(num_bits {str(bits)[:20]}, strategy {str(strategy)[:20]}, group_size {str(group)[:20]}).",
            f"bits of {BITS[0]} to {BITS[-1]}, for a tensor, a channel or a group, are read",
            PLAIN_VERSION,
        )
    ordered = order is True or str(order).lower() in ("group", "dynamic")
    return IntWeights(bits, size, symmetric, ordered)
