"""What happens to a model while transformers loads it as a package.

``begin_loading`` works on the model on the meta device, before any weight is read: experts out, closed router slots
closed, handles on, places for weights in fewer bits. ``finish_loading`` runs when the dense weights are where they
stay: dense products, memory plan, runtime, guards of the context and of the output, prompts in chunks, growing cache,
fast path, batches, one thread at a time.

Peak memory: dense weights, cache slots and what the plan's terms name; never two copies of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.opened_package import OpenedPackage
from conmoe_edge.checkpoint.package.record_headers import record_index
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.compat import Arguments
from conmoe_edge.integrations.dense_weights import (
    check_values,
    finish_dense,
    products_for,
    take_quantised,
)
from conmoe_edge.integrations.device_check import check_device
from conmoe_edge.integrations.load_options import current_options, device_of
from conmoe_edge.integrations.memory_plan import default_context, plan_memory
from conmoe_edge.integrations.no_copies import refuse_copies
from conmoe_edge.integrations.package_match import check_choice, check_layers, check_selection
from conmoe_edge.model.bridge import targets_of
from conmoe_edge.model.experts import find_experts, part_names
from conmoe_edge.model.probe import top_k_of
from conmoe_edge.model.record_match import check_records, token_size
from conmoe_edge.model.rerouting import reroute
from conmoe_edge.model.router import find_routers
from conmoe_edge.model.slot_tensors import SlotTensors
from conmoe_edge.model.text_part import keep_text, lies_in, other_parts
from conmoe_edge.offload.compute.experts_forward import HANDLE, LayerHandle, conmoe_experts_forward
from conmoe_edge.offload.compute.fused_linear import DenseProducts
from conmoe_edge.offload.compute.loaded_experts import take_loaded_experts
from conmoe_edge.offload.fastpath.install import install
from conmoe_edge.offload.generation.batch_rows import take_batches
from conmoe_edge.offload.generation.context_limit import check_context, guard_context
from conmoe_edge.offload.generation.finite import guard_output
from conmoe_edge.offload.generation.long_forward import run_in_chunks
from conmoe_edge.offload.generation.one_at_a_time import take_turns
from conmoe_edge.offload.residency.prefetch import read_maps
from conmoe_edge.offload.runtime import Runtime
from conmoe_edge.offload.simulate.machine_file import with_machine_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS_FUNCTION = "conmoe"


@dataclass(slots=True)
class Loading:
    """What is known between the two steps."""

    folder: Path
    manifest: Manifest
    device: torch.device
    handles: tuple[LayerHandle, ...]
    products: DenseProducts


def begin_loading(
    model: PreTrainedModel, package: OpenedPackage, device_map: dict[str, Any] | None
) -> Loading:
    """Remove the routed experts from the meta model of ``package`` and give each layer its handle.

    Raises:
        PackageError: manifest and model do not describe the same thing.
        UnsupportedModel: the context cannot be counted with this release of transformers.
    """
    Arguments.of(model)  # known before anything large is read
    _without_absent_parts(model, package)
    folder, manifest = package.folder, with_machine_file(package.folder, package.manifest)
    register_experts_function()
    experts = find_experts(model)
    check_layers(folder, manifest, experts)
    check_choice(folder, manifest, top_k_of(model.config.get_text_config()))
    _reroute(model, folder, manifest)
    for layer, (_, module) in experts.items():
        check_records(folder, manifest, layer, module, part_names(module))
    maps = SlotMap.of_manifest(manifest)
    with torch.device("cpu"):  # transformers has made meta the default device around this call
        constants = _check_files(
            folder, manifest, maps, token_size(folder, [module for _, module in experts.values()])
        )
    handles = []
    for layer, (path, module) in experts.items():
        names = part_names(module)
        for name in names:
            delattr(module, name)
        # Some blocks initialise the weights of their experts themselves.
        for owner in (module, model.get_submodule(path.rpartition(".")[0])):
            owner._is_hf_initialized = True  # type: ignore[assignment]
        with torch.device("cpu"):
            slots = SlotTensors.of(maps[layer], constants.get(layer), torch.device("cpu"))
        handle = LayerHandle(slots)
        setattr(module, HANDLE, handle)
        module.config._experts_implementation = EXPERTS_FUNCTION  # type: ignore[union-attr]
        handles.append(handle)
    device = device_of(device_map)
    with torch.device("cpu"):
        products = products_for(device)
    take_quantised(model, package.index, products, quantised=manifest.dense_precision != "source")
    return Loading(folder, manifest, device, tuple(handles), products)


def _without_absent_parts(model: PreTrainedModel, package: OpenedPackage) -> None:
    """Remove the parts for pictures and sound that the package does not have: nobody fills them with numbers."""
    parts = other_parts(model)
    if parts:
        targets = targets_of(model, package.index.tensors)
        if not any(lies_in(parts, target) for target in targets.values()):
            keep_text(model)


def _reroute(model: PreTrainedModel, folder: Path, manifest: Manifest) -> None:
    """Close the slots that the routers of the package may not choose."""
    if not manifest.rerouted:
        return
    routers = find_routers(model)
    for layer in manifest.rerouted:
        router, is_open = routers[layer], manifest.open_slots(layer)
        check_selection(folder, layer, router.slots, router.selection, is_open)
        with torch.device("cpu"):
            reroute(router, is_open)


def finish_loading(model: PreTrainedModel, loading: Loading) -> None:
    """Build the runtime beside the dense weights, as ``model.conmoe``.

    Raises:
        DoesNotFit: the budget holds no prototype.
        UsageError: the context is longer than the model's positions, or the device computes something else than the
            processor.
        UnsupportedModel: the cache has no form in the precision that is asked for.
    """
    check_values(model, loading.folder)
    finish_dense(model, loading.products)
    options = current_options()
    check_context(model, options.context)
    context = options.context or default_context(model.config, loading.manifest)
    memory = plan_memory(model, loading.manifest, loading.device, options, context)
    runtime = Runtime(
        loading.folder,
        loading.manifest,
        loading.handles,
        loading.device,
        budget=memory.budget,
        context=context,
        prefill_chunk=memory.prefill_chunk,
        slots=memory.slots,
        cache_policy=options.cache_policy,
        misses=options.misses,
        cache_bytes=memory.cache_bytes,
        kv_precision=memory.kv_precision,
        progress=options.progress,
    )
    model.conmoe = runtime  # type: ignore[assignment]
    if loading.manifest.method == UNCHANGED and loading.device.type == "cpu":
        take_loaded_experts(model, runtime.arithmetic)
    check_device(model, runtime)
    guard_context(model, context, runtime.make_room)
    guard_output(model, loading.folder, loading.manifest)
    run_in_chunks(model, lambda: runtime.prefill_chunk)
    runtime.fast_path = install(model, runtime.arithmetic.machine, context, memory.kv_precision)
    model.eval()  # transformers has done so before its parts were exchanged, and new ones are made for training
    take_batches(model)
    take_turns(model)
    refuse_copies(model, loading.folder)


def attach_unchanged(
    model: PreTrainedModel, folder: Path, manifest: Manifest, device: torch.device
) -> None:
    """Give a model that was left whole budget, context and counters as well; it has no prototypes."""
    manifest = with_machine_file(folder, manifest)
    finish_loading(model, Loading(folder, manifest, device, (), products_for(device)))


def register_experts_function() -> None:
    """Make ``conmoe`` known as an experts implementation; calling it again does nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if EXPERTS_FUNCTION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, conmoe_experts_forward)


def _check_files(
    folder: Path, manifest: Manifest, maps: Mapping[int, SlotMap], hidden: int
) -> dict[int, Tensor]:
    """Records lie where the manifest says, and the smaller tensors are what it asks for; the constants of each layer
    [C, H] in fp32.
    """
    record_index(folder, manifest)
    if manifest.prefetch is not None:
        read_maps(folder, maps, hidden)
    return read_constants(folder / CONSTANTS_FILE, maps, hidden)
