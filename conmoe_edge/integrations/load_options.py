"""Options of a load that ``from_pretrained`` has no arguments for.

``with loading(LoadOptions(...)): AutoModelForCausalLM.from_pretrained(folder)``. They belong to the running context
(thread or task) and end with the block. Without them the package's plan and the caller's ``device_map`` decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from conmoe_edge.checkpoint.package.opened_package import OpenedPackage
from conmoe_edge.errors import UsageError
from conmoe_edge.memory.budget import Budget


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Attributes:
    budget: what may be used; ``None`` for what the package was planned for.
    context: tokens of key-value cache to keep room for; ``None`` for what was planned.
    slots: cache slots of every record layout instead of what the budget gives.
    cache_policy: which prototype is evicted; ``None`` for the best on the package's trace.
    misses: how prototypes that are not on the GPU are computed.
    beside: bytes that the caller holds beside the model, for a budget of so many bytes and so many tokens of context;
        counted on a CPU, where the process shares the RAM with the model.
    progress: called with (records read, records to read).
    package: what is going to be loaded, where it is open already.
    kv_precision: how keys and values are kept, ``source`` or ``int8``; ``None`` for what the package says.
    """

    budget: Budget | None = None
    context: int | None = None
    slots: Sequence[int] | None = None
    cache_policy: str | None = None
    misses: str = "copy"
    beside: Callable[[int, int], int] | None = None
    progress: Callable[[int, int], None] | None = None
    package: OpenedPackage | None = None
    kv_precision: str | None = None


@dataclass(slots=True)
class Whereabouts:
    """Whether the running load is in this project's code: an exception that comes out of transformers' own is the
    package's fault then, one that comes out of ours is ours.
    """

    in_own_code: bool = False


_OPTIONS: ContextVar[LoadOptions] = ContextVar("conmoe_load_options")
_WHEREABOUTS: ContextVar[Whereabouts] = ContextVar("conmoe_load_whereabouts")


@contextmanager
def loading(options: LoadOptions) -> Iterator[Whereabouts]:
    """Use ``options`` for the packages that are opened inside the block, and tell where their loading is."""
    where = Whereabouts()
    tokens = _OPTIONS.set(options), _WHEREABOUTS.set(where)
    try:
        yield where
    finally:
        _OPTIONS.reset(tokens[0])
        _WHEREABOUTS.reset(tokens[1])


@contextmanager
def own_code() -> Iterator[None]:
    """Inside the block, and after an exception that leaves it, the load is in this project's code."""
    where = _WHEREABOUTS.get(None) or Whereabouts()
    where.in_own_code = True
    yield
    where.in_own_code = False


def current_options() -> LoadOptions:
    """The options of the running load."""
    return _OPTIONS.get(LoadOptions())


def one_device(device_map: Any) -> dict[str, Any] | None:
    """The device map of a package: a single device; ``None`` (transformers' default) is the CPU.

    Raises:
        UsageError: the map spreads the model over several devices or the disk.
    """
    if device_map is None:
        return None
    if isinstance(device_map, str) and device_map in (
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
    ):
        return {
            "": torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else "cpu"
        }
    if not isinstance(device_map, dict):
        return {"": device_map}
    devices = {str(device) for device in device_map.values()}
    if len(devices) > 1 or "disk" in devices:
        raise UsageError(
            "A package runs on one device.",
            f"device_map names {', '.join(sorted(devices))}",
            "device_map={'': 'cuda:0'}, or conmoe_edge.load(DIR, budget='8GB') to offload",
        )
    return {"": next(iter(device_map.values()))}


def device_of(device_map: dict[str, Any] | None) -> torch.device:
    """The device that a one-device map names."""
    if not device_map:
        return torch.device("cpu")
    value = next(iter(device_map.values()))
    device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
