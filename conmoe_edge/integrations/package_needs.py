"""What a package will take on the device, before any of its weights is read.

The arithmetic of ``memory_plan.py`` with the dense weights as the headers have them. Peak memory: the model on the meta
device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.integrations.memory_plan import default_context, needed_bytes
from conmoe_edge.integrations.small_files import read_small_files
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.bridge import without_quantization
from conmoe_edge.model.probe import probe
from conmoe_edge.plan.kv_precision import with_kv
from conmoe_edge.units import MIB

_MADE_BYTES = MIB
"""Of tensors that a model makes itself, such as those of its positions."""


@dataclass(frozen=True, slots=True)
class PackageNeeds:
    """Bytes of a budget.

    Attributes:
        least: with the fewest cache slots.
        everything: with every prototype resident; more would bring nothing.
    """

    least: int
    everything: int


def package_needs(
    folder: Path,
    budget: Budget,
    *,
    context: int | None = None,
    kv_precision: str | None = None,
    beside: Callable[[int, int], int] | None = None,
) -> PackageNeeds:
    """What the package in ``folder`` takes of ``budget``; the other arguments are those of ``load_package``.

    Raises:
        PackageError: the package is damaged.
        UnsupportedModel: its cache has no form in ``kv_precision``.
    """
    package = open_package(folder)
    manifest = package.manifest
    config, _ = read_small_files(package)
    tokens = context or default_context(config, manifest)
    anatomy = with_kv(probe(without_quantization(config)), kv_precision or manifest.kv_precision)
    layers = tuple(replace(layer, dense_bytes=0) for layer in anatomy.layers)
    # Of a package that left its model unchanged these are all weights, experts included: it has no records.
    dense = package.index.total_bytes
    anatomy = replace(anatomy, layers=layers, outside_bytes=dense, dense_matrices=())
    needed = needed_bytes(anatomy, manifest, budget.device, tokens)
    more = _MADE_BYTES
    if beside is not None and budget.device == "cpu":
        more += beside(budget.device_bytes, tokens)
    return PackageNeeds(needed.fixed + needed.smallest + more, needed.everything + more)
