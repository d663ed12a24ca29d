"""What ``fit`` decides about the cache: who stays in the slots, and whether to read ahead.

Both are replays of the calibration's routing for the planned slots. Whether reading ahead pays depends on the rates of
a machine: at the rates of a profile it is part of the package, at measured ones it goes into ``machine.json``. Peak
memory: the trace. Raises ``PackageError`` for a trace that is damaged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.offload.residency.prefetch import prefetch_bytes
from conmoe_edge.offload.simulate.load_settings import planned_cache, prototype_trace, read_trace
from conmoe_edge.offload.simulate.prefetch_search import choose_prefetch
from conmoe_edge.plan.pace import pace
from conmoe_edge.plan.trace import Predictions


def planned_caching(folder: Path, manifest: Manifest, prototype_bytes: int) -> Manifest:
    """``manifest`` with ``cache`` for slots of ``prototype_bytes``."""
    return replace(manifest, cache=planned_cache(folder, manifest, prototype_bytes))


def planned_prefetch(
    folder: Path,
    manifest: Manifest,
    predictions: Predictions | None,
    anatomy: ModelAnatomy,
    budget: Budget,
    prototype_bytes: int,
) -> Manifest:
    """``manifest``, whose ``cache`` is decided, with ``prefetch`` for the rates of ``budget``; where they are unknown
    nothing is read ahead.

    ``predictions`` are those of the package's predictor, ``None`` where it has none; ``anatomy`` has the dense bytes
    as they are stored.
    """
    cache = manifest.cache
    trace = read_trace(folder, manifest)
    if not cache or predictions is None or trace is None:
        return manifest
    slots = [one.slots for one in cache]
    sizes = [manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes]
    held = sum(n * layout.nbytes for n, layout in zip(slots, manifest.layouts, strict=True))
    records = [(layout.precision, layout.nbytes) for layout in manifest.layouts]
    rates = pace(anatomy, budget, records, sum(sizes) - held)
    prefetch = choose_prefetch(
        prototype_trace(trace, manifest), predictions, manifest, cache, rates
    )
    manifest = replace(manifest, prefetch=prefetch)
    if prefetch_bytes(manifest):  # the maps take some of the room
        cache = planned_cache(folder, manifest, prototype_bytes - prefetch_bytes(manifest))
    return replace(manifest, cache=cache)
