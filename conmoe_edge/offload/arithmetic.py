"""In which number format an expert's matrix products run: a fixed rule, and the scratch that it
needs.

The rule looks at the processor and at how many tokens an expert got, never at memory, cache state
or a stopwatch, so the same package gives the same tokens at every budget on one machine. (A prompt
that is cut into chunks of another length gives every expert other numbers of tokens, and the sums
may then differ in their last bit, as with any program.)

Why there is a choice at all: on processors without bf16 instructions, bf16 matrix products of many
rows run at a fraction of the speed of fp32, so the expert is converted once and computed in fp32;
for few rows reading half the bytes wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe_edge.units import round_up

WIDE_FROM_ROWS = 16
"""From this many tokens on, fp32 wins on a processor without bf16 instructions (conversion
included).
"""

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Machine:
    """What the rule may look at."""

    device: str
    native_bf16: bool

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """The machine that runs."""
        if device.type != "cpu":
            return cls(device.type, True)
        probes = (
            getattr(torch.cpu, name, None)
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
        return cls("cpu", any(probe() for probe in probes if probe is not None))


def compute_dtype(
    machine: Machine, hidden: torch.dtype, weight: torch.dtype, rows: int
) -> torch.dtype:
    """The format of an expert's matrix products for ``rows`` tokens in ``hidden`` and weights in
    ``weight``.
    """
    if hidden == torch.float64:
        return torch.float64
    if machine.device != "cpu":
        return hidden
    if torch.float32 in (hidden, weight):
        return torch.float32
    if not machine.native_bf16 and rows >= WIDE_FROM_ROWS:
        return torch.float32
    return hidden


class Scratch:
    """One expert in another format, in memory that is used again for the next one.

    Peak memory: the largest expert that was asked for, in the widest format; allocated with the
    first use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def convert(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
        """``parts`` in ``dtype``: as they are where they have it already, else copied into the
        scratch.
        """
        if all(part.dtype == dtype for part in parts.values()):
            return parts
        starts, end = [], 0
        for part in parts.values():
            starts.append(end)
            end = round_up(end + part.numel() * dtype.itemsize, _ALIGNMENT)
        if self._memory.numel() < end:
            with torch.inference_mode(
                False
            ):  # written to again later, in whatever mode the caller is then
                self._memory = torch.empty(
                    0, dtype=torch.uint8, device=self._device
                )  # never two of them
                self._memory = torch.empty(end, dtype=torch.uint8, device=self._device)
        converted = {}
        for start, (name, part) in zip(starts, parts.items(), strict=True):
            raw = self._memory[start : start + part.numel() * dtype.itemsize]
            converted[name] = raw.view(dtype).view(part.shape).copy_(part)
        return converted
