"""The operator on a GPU: one token through a layer's prototypes, where they lie and in the form in which they lie.

Experimental: it was checked in Triton's interpreter and by its compiler, and has not run on a card yet.

``gpu_operator(device)`` is the one way in: a ``GpuOperator``, or ``None`` where there is no Triton or its kernels do
not compute what they should (``why_not`` says why); callers then use torch. Weights in bf16, fp16, 8 and 4 bits are
widened to fp32 as they are read and summed in fp32.

A layer is four launches, and nothing is read back: what the router has chosen is merged, looked up and computed on the
device. Where prototypes come and go the host reads ``Chosen.numbers``, brings what is missing, and says which of them
``experts`` is to compute now; every prototype's output is the same bits in any company.

Memory: outputs of one token's prototypes, once a shape.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import DOWN, UP, Kind, Part, quantised_parts
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.records import decode, encode, pack, view
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.offload.kernels.triton.gpu_tables import (
    HALVES,
    PLANES,
    GpuForm,
    GpuLayer,
    GpuTable,
)

__all__ = ["Chosen", "GpuForm", "GpuLayer", "GpuOperator", "GpuTable", "gpu_operator", "why_not"]

MOST_SLOTS = 30
"""That a router may choose: a bit each in a number of 32."""
_ROWS, _STEP, _BLOCK = 8, 256, 256
_GROUPS = 4
"""Groups of columns that are read at once where numbers lie in planes: 16 bytes for each of 128 threads in 2 bits."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one token asks of a layer, on the device; overwritten by the next token of that shape.

    Attributes:
        numbers: int64 [K], prototypes ascending, -1 behind the last.
        weights: fp32 [K].
        inner: fp32 [K, 2 I], gate and up rows of each.
        outputs: fp32 [K, H].
    """

    numbers: Tensor
    weights: Tensor
    inner: Tensor
    outputs: Tensor


class GpuOperator:
    """The compiled operator of one device."""

    def __init__(self, kernels: Any, device: torch.device) -> None:
        """``kernels``: the module ``triton_kernels.py``."""
        self._kernels, self.device = kernels, device
        # Triton launches on the current device, whichever its tensors are on.
        self._here = (lambda: torch.cuda.device(device)) if device.type == "cuda" else nullcontext
        self._rooms: dict[tuple[int, int, int], Chosen] = {}
        self.name = "triton"

    def merge(self, layer: GpuLayer, slots: Tensor, gates: Tensor, *, counted: bool) -> Chosen:
        """What the router has chosen, by prototypes.

        Args:
            layer: its slots.
            slots: int64, K of them, contiguous.
            gates: theirs, contiguous.
            counted: whether ``layer.table.asked`` grows by how many prototypes there are.
        """
        count, known = slots.numel(), layer.slots
        room = self._room(count, layer.width, layer.hidden)
        with self._here():
            self._kernels.merge[(1,)](
                *(slots, gates, known.targets, known.scales, room.numbers, room.weights),
                *(layer.table.asked, count, known.targets.numel()),
                SCALED=known.scales is not None,
                COUNTED=counted,
                ROOM=_power_of_two(count),
            )
        return room

    def experts(self, layer: GpuLayer, chosen: Chosen, wanted: int, x: Tensor) -> None:
        """D_i (silu(G_i x) * U_i x) into ``chosen.outputs``, of the prototypes whose bits are set in ``wanted``.

        ``x``: H values, contiguous. Their records are on the device, or will be when this runs.
        """
        table, hidden, width = layer.table, layer.hidden, layer.width
        sides = (
            (x, 0, chosen.inner, 2 * width, 2 * width),
            (chosen.inner, 2 * width, chosen.outputs, hidden, hidden),
        )
        with self._here():
            for side, (given, step, out, out_step, height) in enumerate(sides):
                arguments = (
                    chosen.numbers,
                    wanted,
                    table.base,
                    table.values[side],
                    table.scales[side],
                    table.widths,
                )
                blocks, count = -(-height // 64), chosen.numbers.numel()
                kind, rest = layer.kinds[side], (given, step, out, out_step, hidden)
                if kind in HALVES:
                    self._kernels.tiles[(blocks, count)](
                        *(*arguments, table.groups[side], *rest),
                        KIND=kind,
                        GATED=side == 1,
                        STEP=layer.steps[side],
                    )
                elif kind in PLANES:
                    self._kernels.planes[(blocks, count)](
                        *(*arguments, *rest), BITS=PLANES[kind], GATED=side == 1, GROUPS=_GROUPS
                    )
                else:
                    self._kernels.rows[(-(-height // _ROWS), count)](
                        *(*arguments, *rest), KIND=kind, GATED=side == 1, ROWS=_ROWS, STEP=_STEP
                    )

    def combine(
        self, layer: GpuLayer, chosen: Chosen, slots: Tensor, gates: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The routed experts' output [1, H] in ``dtype``; ``slots`` and ``gates`` as of ``merge``."""
        hidden, known = layer.hidden, layer.slots
        out = torch.empty(1, hidden, dtype=dtype, device=self.device)
        with self._here():
            self._kernels.combine[(-(-hidden // _BLOCK),)](
                *(chosen.numbers, chosen.weights, chosen.outputs, hidden, slots, gates),
                *(known.constant_of, known.constants, out, slots.numel(), known.targets.numel()),
                CONSTANTS=known.constants is not None,
                BLOCK=_BLOCK,
            )
        return out

    def _room(self, count: int, width: int, hidden: int) -> Chosen:
        key = (count, width, hidden)
        if key not in self._rooms:
            with torch.inference_mode(False):
                empty = {"dtype": torch.float32, "device": self.device}
                self._rooms[key] = Chosen(
                    torch.empty(count, dtype=torch.int64, device=self.device),
                    torch.empty(count, **empty),
                    torch.empty(count, 2 * width, **empty),
                    torch.empty(count, hidden, **empty),
                )
        return self._rooms[key]


def gpu_operator(device: torch.device) -> GpuOperator | None:
    """The operator of ``device``, compiled when it is first asked for; ``None`` where there is none."""
    return _state(device)[0] if device.type == "cuda" else None


def why_not(device: torch.device) -> str:
    """Why there is no operator; empty where there is one."""
    return _state(device)[1] if device.type == "cuda" else f"{device} is no GPU"


@cache
def _state(device: torch.device) -> tuple[GpuOperator | None, str]:
    try:
        from conmoe_edge.offload.kernels.triton import triton_kernels as kernels

        made = GpuOperator(kernels, device)
        wrong = check(made)
    except Exception as error:  # no Triton, no compiler for it, a card that it does not know
        return None, f"{type(error).__name__}: {str(error)[:200]}"
    return (None, wrong) if wrong else (made, "")


def check(made: GpuOperator) -> str:
    """A compiler's mistake must not become a model's mistake: a small layer for each form of gate and up rows, with
    another one of down rows; what is wrong, or nothing.
    """
    generator = torch.Generator().manual_seed(0)
    kinds: tuple[Kind, ...] = ("plain", "int8", "int4", "mxfp4", "q4", "q3", "q2")
    for place, kind in enumerate(kinds):
        wrong = _check(made, (kind, kinds[place - 1]), generator)
        if wrong:
            return wrong
    return ""


def _check(made: GpuOperator, kinds: tuple[Kind, Kind], generator: torch.Generator) -> str:
    """``kinds``: of gate and up rows, and of down rows."""
    hidden, width, device = 128, 64, made.device

    def random(*shape: int) -> Tensor:
        # The first call may come while transformers has set a default device and format of its own.
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    up, down = kinds
    parts = [*_parts(UP, 2 * width, hidden, up), *_parts(DOWN, hidden, width, down)]
    layout = make_layout(parts)
    table = GpuTable([layout], [0, 0], device)
    records, experts = [], []
    for number in range(2):
        given = {UP: random(2 * width, hidden) / 8, DOWN: random(hidden, width) / 8}
        record = pack(layout, encode(layout, given, False))
        decoded = decode(view(layout, record), torch.float32, False)
        experts.append({name: part.float() for name, part in decoded.items()})
        records.append(record.to(device))
        table.put(number, records[number].data_ptr())
    some = SlotMap(0, targets=(1, NONE, 0, 1), scales=(1.0,) * 4, constants=(NONE,) * 4)
    layer = GpuLayer.of(table, SlotTensors.of(some, None, device))
    if layer is None:
        return f"{' and '.join(kinds)}: the kernels do not take it"
    x = random(1, hidden).bfloat16()
    slots = torch.tensor([[3, 1, 0, 2]], dtype=torch.int64, device=device)
    gates = torch.tensor([[0.5, 0.25, 0.75, 1.5]], dtype=torch.float32, device=device)
    chosen = made.merge(layer, slots, gates, counted=False)
    made.experts(layer, chosen, 0b1111, x.to(device))
    found = made.combine(layer, chosen, slots, gates, torch.float32).cpu()
    wanted = torch.zeros(1, hidden, dtype=torch.float32, device="cpu")
    for expert, weight in zip(experts, (1.5, 1.25), strict=True):
        gate, up = (x.float() @ expert[UP].T).chunk(2, -1)
        wanted += weight * ((torch.nn.functional.silu(gate) * up) @ expert[DOWN].T)
    near = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
    return "" if near else f"{' and '.join(kinds)}: the kernels compute something else"


def _parts(name: str, rows: int, columns: int, kind: Kind) -> tuple[Part, ...]:
    if kind == "plain":
        return ((name, (rows, columns), "bfloat16"),)
    return quantised_parts(name, rows, columns, kind)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
