"""What becomes of prototypes that are not on the GPU: copied there, or computed by the processor where they lie.

Copies and the processor work side by side, so the missing ones are divided such that the later of the two is over
first. A copy takes the record's bytes over the link's rate, the processor the same bytes over what its kernel gets out
of the memory; with one token there is no more to it (``cpu_fallback.py`` measures both). Of equal times
the one with fewer on the processor is taken: what is copied is there for the next token.

A processor and a GPU round differently, so with ``auto`` the last bits of a result depend on what was resident.
``copy`` is the default, and gives the same tokens in any budget. Numbers only: no torch, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from conmoe_edge.errors import UsageError

MISSES = ("copy", "auto")


@dataclass(frozen=True, slots=True)
class MissCosts:
    """Seconds.

    Attributes:
        copy: of one record to the GPU.
        compute: of one prototype by the processor, for one token.
        detour: of the activations to the processor and of the outputs back.
    """

    copy: float
    compute: float
    detour: float

    def seconds(self, missing: int, aside: int) -> float:
        """Until all ``missing`` are there or computed, ``aside`` of them by the processor."""
        processor = self.detour + aside * self.compute if aside else 0.0
        return max((missing - aside) * self.copy, processor)

    def aside(self, missing: int) -> int:
        """How many of ``missing`` the processor should compute."""
        return min(range(missing + 1), key=lambda count: (self.seconds(missing, count), count))


def check_misses(name: str) -> None:
    """Raises ``UsageError`` for a name that is none of ``MISSES``."""
    if name not in MISSES:
        raise UsageError(
            f"{name!r} is no way to treat what is not on the GPU.",
            f"there are: {', '.join(MISSES)}",
            "--misses auto, or leave it out to copy",
        )
