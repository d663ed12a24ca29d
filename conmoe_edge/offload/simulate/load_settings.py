"""The routing trace of a package, and the cache settings that follow from it at load.

A package may come from anywhere, so all of its trace is checked. Peak memory: the trace (``plan/trace.py``). Raises
``PackageError`` for a trace that is damaged or belongs to another package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from conmoe_edge.checkpoint.format.manifest import ROUTING_FILE, CacheSettings, Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.fs.contained import path_inside
from conmoe_edge.checkpoint.package.small_tensors import Wanted, check_exactly, damaged, header_of
from conmoe_edge.errors import CheckpointError
from conmoe_edge.offload.residency.policies import POLICIES, default_settings
from conmoe_edge.offload.residency.quota import groups_of, slots_for
from conmoe_edge.offload.simulate.policy_search import choose
from conmoe_edge.plan.trace import MOST_TOKENS, PrototypeTrace, RoutingTrace, to_prototypes

_SLOT_FORMATS = ("U8", "I16", "I32")


def settings_for(
    folder: Path, manifest: Manifest, slots: Sequence[int], policy: str | None = None
) -> tuple[CacheSettings, ...]:
    """One entry a layout for ``slots``.

    What ``fit`` chose where it was for as many slots; else the best by a replay of the package's trace; else, in a
    package without a trace, the defaults. ``policy`` overrides the kind of policy in each case.
    """
    counts = Counter(entry.layout for entry in manifest.prototypes)
    if all(counts[layout] <= have for layout, have in enumerate(slots)):
        return default_settings(manifest, slots)
    known = manifest.cache
    if tuple(one.slots for one in known) == tuple(slots) and (
        all(_usable(one, manifest) for one in known)
        and (policy is None or all(one.policy == policy for one in known))
    ):
        return known
    trace = read_trace(folder, manifest)
    if trace is None:
        return default_settings(manifest, slots, policy)
    return choose(prototype_trace(trace, manifest), manifest, slots, policy)


def planned_cache(
    folder: Path, manifest: Manifest, prototype_bytes: int
) -> tuple[CacheSettings, ...]:
    """What ``fit`` writes into the manifest: the best settings for as many slots as ``prototype_bytes`` hold.

    Empty where they hold every prototype, or not one of each layout, or there is no trace.
    """
    trace = read_trace(folder, manifest)
    counts = Counter(entry.layout for entry in manifest.prototypes)
    records = [(layout.nbytes, counts[i]) for i, layout in enumerate(manifest.layouts)]
    if trace is None or sum(nbytes for nbytes, _ in records) > prototype_bytes:
        return ()
    slots = slots_for(prototype_bytes, 0, records)
    return choose(prototype_trace(trace, manifest), manifest, slots)


def prototype_trace(trace: RoutingTrace, manifest: Manifest) -> PrototypeTrace:
    """The trace in the package's prototype numbers."""
    maps = SlotMap.of_manifest(manifest)
    return to_prototypes(trace, {layer: maps[layer].targets for layer in trace.layers})


def read_trace(folder: Path, manifest: Manifest) -> RoutingTrace | None:
    """The package's trace; ``None`` where it has none."""
    if ROUTING_FILE not in manifest.files:
        return None
    path = folder / ROUTING_FILE
    header = header_of(path)
    tokens = range(1, MOST_TOKENS + 1)
    wanted = {"sequences": Wanted(("I32",), (tokens,))}
    for layer, slots in manifest.slots.items():
        wanted[f"routing.{layer}"] = Wanted(_SLOT_FORMATS, (tokens, range(1, len(slots) + 1)))
    check_exactly(path, header, wanted)
    try:  # by numpy, because a look at a package does not wait for torch
        tensors = load_file(path_inside(folder, ROUTING_FILE))
    except (OSError, SafetensorError, CheckpointError) as error:
        raise damaged(path, str(error)[:200]) from error
    lengths = [int(one) for one in tensors["sequences"].tolist()]
    if min(lengths) < 1 or sum(lengths) > MOST_TOKENS:
        raise damaged(path, f"sequences of {min(lengths)} tokens and more, {sum(lengths)} together")
    rows, layers = [], tuple(sorted(manifest.slots))
    for layer in layers:
        chosen, slots = tensors[f"routing.{layer}"], len(manifest.slots[layer])
        if len(chosen) != sum(lengths):
            raise damaged(path, f"layer {layer} does not hold a row of router slots a token")
        if int(chosen.min()) < 0 or int(chosen.max()) > slots:  # ``slots`` itself is the skip mark
            raise damaged(path, f"layer {layer} names router slots beyond its {slots}")
        rows.append(tuple(map(tuple, chosen.tolist())))
    return RoutingTrace(layers, tuple(lengths), tuple(rows))


def _usable(settings: CacheSettings, manifest: Manifest) -> bool:
    """Whether this version knows the policy, and the quotas are those of the package's layers."""
    groups = len(set(groups_of(manifest))) if settings.policy == "layer-lru" else 0
    return settings.policy in POLICIES and len(settings.quotas) == groups
