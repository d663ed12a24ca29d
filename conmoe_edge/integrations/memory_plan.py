"""How much of the budget goes to cache slots when a package is opened.

The plan's arithmetic with two measured figures: the dense weights, and the key-value cache in the loaded dtype.

The prefill chunk is the package's, not the budget's, because the number of tokens in one forward can change the last
bit of a sum. A smaller budget has fewer cache slots, down to one of each record layout; below that the load refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from conmoe_edge.checkpoint.format.manifest import MAX_CHUNK, USUAL_CHUNK, Manifest
from conmoe_edge.errors import DoesNotFit, PackageError
from conmoe_edge.integrations.load_options import LoadOptions
from conmoe_edge.memory.budget import Budget, DeviceKind, kind_of
from conmoe_edge.model.accelerator import budget_here
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.model.bridge import without_quantization
from conmoe_edge.model.probe import probe
from conmoe_edge.offload.residency.prefetch import prefetch_bytes
from conmoe_edge.offload.residency.quota import slots_for
from conmoe_edge.plan.kv_precision import with_kv
from conmoe_edge.plan.least import least_size
from conmoe_edge.plan.needs import needs_of
from conmoe_edge.plan.plan import Plan
from conmoe_edge.plan.serialise import plan_from_json
from conmoe_edge.units import human_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Memory:
    """How the budget is divided.

    Attributes:
        budget: the one that holds.
        slots: cache slots of every record layout.
        prefill_chunk: tokens of a prompt that go through the model at a time.
        cache_bytes: bytes of the key-value cache at so many tokens; ``None`` where the caller chose the slots.
        kv_precision: how that cache is kept.
    """

    budget: Budget
    slots: tuple[int, ...]
    prefill_chunk: int
    cache_bytes: Callable[[int], int] | None = None
    kv_precision: str = "source"


@dataclass(frozen=True, slots=True)
class Needed:
    """Bytes on the device.

    Attributes:
        fixed: of everything but prototypes.
        records: of one prototype of each record layout, and how many there are.
    """

    fixed: int
    records: tuple[tuple[int, int], ...]

    @property
    def smallest(self) -> int:
        """Of the fewest cache slots: one of each layout."""
        return sum(nbytes for nbytes, count in self.records if count)

    @property
    def everything(self) -> int:
        """Of all of it, with every prototype resident."""
        return self.fixed + sum(nbytes * count for nbytes, count in self.records)


def needed_bytes(
    anatomy: ModelAnatomy, manifest: Manifest, kind: DeviceKind, context: int
) -> Needed:
    """What a package takes with ``context`` tokens; ``anatomy`` has the dense bytes and how the cache is kept."""
    counts = [0] * len(manifest.layouts)
    for entry in manifest.prototypes:
        counts[entry.layout] += 1
    records = tuple(
        (layout.nbytes, count) for layout, count in zip(manifest.layouts, counts, strict=True)
    )
    largest = max((nbytes for nbytes, _ in records), default=0)
    needs = needs_of(anatomy, kind, context)
    chunk = min(chunk_of(manifest), context)
    return Needed(needs.fixed(largest) + prefetch_bytes(manifest) + needs.workspace(chunk), records)


def plan_memory(
    model: PreTrainedModel,
    manifest: Manifest,
    device: torch.device,
    options: LoadOptions,
    context: int,
) -> Memory:
    """Divide the budget for a model whose dense weights are loaded.

    Raises:
        DoesNotFit: the budget holds not one prototype of each layout beside the package's chunk.
        UnsupportedModel: the cache has no form in the precision that is asked for.
    """
    kind = kind_of(device.type)
    budget = options.budget or default_budget(planned_by(manifest), kind)
    chunk = min(chunk_of(manifest), context)
    kv = options.kv_precision or manifest.kv_precision
    if options.slots is not None and kv == "source":
        return Memory(budget, tuple(options.slots), chunk)
    anatomy = with_kv(loaded_anatomy(model), kv)
    if options.slots is not None:
        return Memory(budget, tuple(options.slots), chunk, kv_precision=kv)
    needed = needed_bytes(anatomy, manifest, kind, context)
    fixed = needed.fixed
    if options.beside is not None and kind == "cpu":
        fixed += options.beside(budget.device_bytes, context)
    records = needed.records
    least = fixed + needed.smallest
    if least > budget.device_bytes:
        raise _too_small(fixed, least, chunk, budget, unchanged=not records)
    slots = slots_for(budget.device_bytes, fixed, records)
    return Memory(budget, slots, chunk, anatomy.kv_bytes, kv)


def _too_small(
    fixed: int, least: int, chunk: int, budget: Budget, *, unchanged: bool
) -> DoesNotFit:
    """The error for a budget below ``least``, of which ``fixed`` is everything but prototypes."""
    again = f"conmoe-edge fit MODEL --gpu {budget.asked} --out DIR"
    if unchanged:
        return DoesNotFit(
            f"This model needs {human_size(least)}, and the budget is {human_size(budget.device_bytes)}.",
            "it was left unchanged because it fitted the budget that fit was given",
            f"Give --gpu {least_size(least)}, or make a package for this budget: {again}",
        )
    return DoesNotFit(
        f"The budget of {human_size(budget.device_bytes)} holds no prototype.",
        f"everything else needs {human_size(fixed)} with the package's {chunk} tokens of a prompt at a time, which are "
        f"part of what it answers, and the fewest cache slots another {human_size(least - fixed)}",
        f"Give at least --gpu {least_size(least)}, or a smaller --context, or make a package for this budget: {again}",
    )


def chunk_of(manifest: Manifest) -> int:
    """Tokens of a prompt that go through the model at a time: a constant of the package, whatever the budget.

    Packages from before the manifest named it have it in their plan, also where this version reads the rest of that
    no more; without a plan it is the most that plans took then.
    """
    if manifest.prefill_chunk is not None:
        return manifest.prefill_chunk
    planned = manifest.plan.get("prefill_chunk")
    if isinstance(planned, int) and 1 <= planned <= MAX_CHUNK:
        return planned
    return USUAL_CHUNK


def planned_by(manifest: Manifest) -> Plan | None:
    """The plan that the package was made by; ``None`` where this version reads none."""
    if not manifest.plan:
        return None
    try:
        return plan_from_json(manifest.plan)
    except PackageError:
        # A plan is there for readers; one from another version does not keep a package from running.
        return None


def default_budget(planned: Plan | None, kind: DeviceKind) -> Budget:
    """What the package was planned for, where this is that kind of device and has as much; else what is free here."""
    here = budget_here("auto", kind)
    if (
        planned is None
        or planned.budget.device != kind
        or planned.budget.device_bytes > here.device_bytes
    ):
        return here
    return replace(planned.budget, host_bytes=here.host_bytes)


def default_context(config: PretrainedConfig, manifest: Manifest) -> int:
    """The planned context; else ``DEFAULT_CONTEXT``, or the model's own limit where that is less."""
    planned = planned_by(manifest)
    if planned is not None:
        return planned.context
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
    return min(int(longest), DEFAULT_CONTEXT)


def loaded_anatomy(model: PreTrainedModel) -> ModelAnatomy:
    """The anatomy of a loaded model: its config in the dtype that was loaded, its dense bytes as measured."""
    config = without_quantization(model.config)  # probe takes the plain model
    config.dtype = model.dtype
    anatomy = probe(config)
    seen = {
        tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]
    }  # tied ones once
    dense = sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
    layers = tuple(replace(layer, dense_bytes=0) for layer in anatomy.layers)
    return replace(anatomy, layers=layers, outside_bytes=dense, dense_matrices=())
