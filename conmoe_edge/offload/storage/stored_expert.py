"""One prototype as it lies in its cache slot: the record's tensors, and their addresses for the operator.

Made once a slot, when the slot is first computed with; what a slot holds changes, where its parts lie does not.
Memory: nothing beside the slot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.forms import COLUMNS, DOWN, LEFT, SCALE, UP
from conmoe_edge.checkpoint.format.records import matrix_of
from conmoe_edge.offload.kernels.cpu.bindings import Form, Prepared, operator

_BIAS = "_bias"


class StoredExpert:
    """The parts of a record by name: views of the slot's bytes.

    Attributes:
        parts: every tensor of the record.
        prepared: the weight matrices that the operator can take, by the names of their parts.
        quantised: whether some weights have scales; those are [out, in], whatever the module's own order.
        some_plain: whether some have none, and are in the module's own order.
        factored: whether they are low rank and a few columns, [out, in] as well.
        forms: what two experts must have in common for a product in one call; ``None`` without the operator.
        matrices: both matrices, where they, perhaps with ``biases``, make up the expert, for ``gated_experts``; else
            ``None``.
        biases: of both, bf16; ``None`` for none.
        kin: what two experts must have in common there, where they may have different numbers of neurons.
    """

    __slots__ = (
        "biases",
        "factored",
        "forms",
        "kin",
        "matrices",
        "parts",
        "prepared",
        "quantised",
        "some_plain",
    )

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self.parts = parts
        names = [name for name in parts if not name.endswith((SCALE, COLUMNS, _BIAS))]
        self.quantised = any(name + SCALE in parts for name in names)
        self.some_plain = any("." not in name and name + SCALE not in parts for name in names)
        self.factored = any(name.endswith(LEFT) for name in names)
        self.prepared: dict[str, Prepared] = {}
        engine = operator() if all(part.device.type == "cpu" for part in parts.values()) else None
        if engine is not None:
            for name in names:
                found = engine.prepare(matrix_of(parts, name))
                if found is not None:
                    self.prepared[name] = found
        whole = len(self.prepared) == len(names)
        self.forms: tuple[Form, ...] | None = (
            tuple(one.form for one in self.prepared.values()) if whole else None
        )
        up, down = self.prepared.get(UP), self.prepared.get(DOWN)
        biased = sum(name.endswith(_BIAS) for name in parts)
        self.biases: tuple[Tensor, Tensor] | None = None
        self.matrices: tuple[Prepared, Prepared] | None = None
        self.kin: tuple[int, ...] = ()
        if up is not None and down is not None:
            self.biases = _biases(parts, up, down)
            if _go_together(up, down) and biased == (0 if self.biases is None else 2):
                self.matrices = up, down
                self.kin = (up.form.code, up.form.group, down.form.code, biased)

    def suits_operator(self, module: nn.Module, hidden: torch.dtype) -> bool:
        """Whether the operator computes this expert of ``module`` for activations in ``hidden``.

        Plain weights of a model in fp32 stay with torch, so that such a model gives transformers' own numbers.
        """
        if self.forms is None or hidden == torch.float64:
            return False
        own = self.quantised or self.factored
        if module.is_transposed and self.some_plain:
            return False
        return own or (hidden != torch.float32 and not module.is_transposed)


def _go_together(up: Prepared, down: Prepared) -> bool:
    """Whether both are [out, in]: never so for plain weights of a module that keeps them the other way round."""
    rows, inner = up.form.rows, down.form.columns
    return rows == 2 * inner and down.form.rows == up.form.columns


def _biases(
    parts: Mapping[str, Tensor], up: Prepared, down: Prepared
) -> tuple[Tensor, Tensor] | None:
    """Both biases in bf16; ``None`` where they are not there, or go with matrices that lie the other way round."""
    first, second = parts.get(UP + _BIAS), parts.get(DOWN + _BIAS)
    if first is None or second is None:
        return None
    fits = first.numel() == up.form.rows and second.numel() == down.form.rows
    narrow = first.dtype == second.dtype == torch.bfloat16
    return (first, second) if fits and narrow else None
