"""The budget: what the target machine gives, as named parts.

A ``Budget`` is plain data and may describe another machine than the one that runs: ``fit`` may prepare a package on a
server for a laptop. Bandwidths are bytes per second and may be unknown (``None``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

DeviceKind = Literal["cpu", "cuda", "mps", "xpu"]
"""Where a package computes, in torch's words: AMD's GPUs are ``cuda`` to it, Apple's ``mps``, Intel's ``xpu``."""
DeviceWord = Literal["auto", "cpu", "cuda", "mps", "xpu", "hip"]
"""What a user may say; ``hip`` is ``cuda`` on an AMD GPU."""


def kind_of(word: str) -> DeviceKind:
    """The kind of a device by torch's word or a user's; what is none of the others is ``cuda``."""
    return word if word in get_args(DeviceKind) else "cuda"  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be used on the target.

    Attributes:
        device: where the compute happens; on ``cpu`` the device tier is RAM and the backing tier is the disk.
            On ``mps``, and on other GPUs that share the RAM, it is the same: one pool, counted once.
        device_bytes: hard ceiling of the device tier, everything included (context, weights, caches, workspace).
        asked: the user's own word, ``24GB``, ``rtx-4090`` or ``auto``.
        source: one sentence that says where ``device_bytes`` comes from.
        host_bytes: RAM for the backing tier of a GPU, no more than may be page-locked; ``None`` where unknown, 0 where
            the device tier is the RAM (there is no tier between).
        device_bandwidth: memory of the device, bytes/s.
        link_bandwidth: from the backing tier to the device, bytes/s (PCIe for a GPU; the disk for ``cpu``).
        disk_bandwidth: sequential reads of records from the disk, bytes/s.
        in_use_by_others: device bytes that other processes hold, already taken off ``device_bytes`` where measured.
        here: what the machine at hand says to it, such as that less is free now; empty where it says nothing.
        measured: whether rates, ``host_bytes``, ``in_use_by_others`` and ``here`` are of the machine at hand and of
            this hour; else they follow from what was asked, as those of a profile do.
    """

    device: DeviceKind
    device_bytes: int
    asked: str
    source: str
    host_bytes: int | None = None
    device_bandwidth: float | None = None
    link_bandwidth: float | None = None
    disk_bandwidth: float | None = None
    in_use_by_others: int = 0
    here: str = ""
    measured: bool = False

    @property
    def above_disk(self) -> bool:
        """Whether what the device tier does not hold comes from the disk, with no tier of RAM between."""
        return self.device in ("cpu", "mps") or self.host_bytes == 0

    def without_measurements(self) -> Budget:
        """What follows from the user's word alone: the same on every machine and at any time.

        With ``auto`` the word itself means what is free here now, so ``device_bytes`` stays what it was.
        """
        if not self.measured:
            return self
        return replace(
            self,
            host_bytes=0 if self.device in ("cpu", "mps") else None,
            device_bandwidth=None,
            link_bandwidth=None,
            disk_bandwidth=None,
            in_use_by_others=0,
            here="",
        )
