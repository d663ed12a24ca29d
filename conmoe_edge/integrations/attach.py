"""Between transformers' loading and the runtime: take the experts out, build the runtime
afterwards.

``begin_loading`` works on the model on the meta device, before any weight is read;
``finish_loading`` runs when the dense weights are where they belong, measures them, asks the plan's
arithmetic how many cache slots the budget leaves, and allocates. Peak memory: dense weights, slots
and what the plan's terms name; never two copies of an expert. Raises ``PackageError`` where
manifest and model do not describe the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.forms import (
    KIND_OF_VALUES,
    LEFT,
    RIGHT,
    SCALE,
    best_kind,
    factored_parts,
    quantised_parts,
)
from conmoe_edge.checkpoint.format.manifest import Manifest, RecordPart
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.package.slot_constants import CONSTANTS_FILE, read_constants
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.dense_weights import finish_dense, products_for, take_quantised
from conmoe_edge.integrations.load_options import current_options, device_of
from conmoe_edge.integrations.memory_plan import default_context, plan_memory
from conmoe_edge.model.anatomy import narrowed_shape
from conmoe_edge.model.experts import find_experts, part_names
from conmoe_edge.model.rerouting import can_choose, reroute
from conmoe_edge.model.router import find_routers
from conmoe_edge.offload.compute.experts_forward import HANDLE, LayerHandle, conmoe_experts_forward
from conmoe_edge.offload.compute.fused_linear import DenseProducts
from conmoe_edge.offload.fastpath.install import install
from conmoe_edge.offload.generation.context_limit import guard_context
from conmoe_edge.offload.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS_FUNCTION = "conmoe"
_AGAIN = "Make the package again with conmoe-edge fit, or copy it again from where it came from."


@dataclass(slots=True)
class Loading:
    """What is known between the two steps."""

    folder: Path
    manifest: Manifest
    device: torch.device
    handles: tuple[LayerHandle, ...]
    products: DenseProducts


def begin_loading(
    model: PreTrainedModel, checkpoint_files: Sequence[str], device_map: dict[str, Any] | None
) -> Loading:
    """Remove the routed experts from a meta model and give each layer its handle."""
    if not checkpoint_files:
        raise PackageError(
            "The package has no dense weights.", "model.safetensors.index.json names none", _AGAIN
        )
    folder = Path(checkpoint_files[0]).parent
    manifest = load_manifest(folder)
    register_experts_function()
    experts = find_experts(model)
    if sorted(experts) != sorted(manifest.slots):
        raise PackageError(
            f"The package in {folder} does not match its config.json.",
            f"the model has routed experts in layers {sorted(experts)}, "
            f"the manifest in {sorted(manifest.slots)}",
            _AGAIN,
        )
    _reroute(model, folder, manifest)
    constants = _read_constants(folder, manifest)
    handles = []
    for layer, (_, module) in experts.items():
        names = part_names(module)
        _check_shapes(folder, manifest, layer, module, names)
        for name in names:
            delattr(module, name)
        module._is_hf_initialized = True  # type: ignore[assignment]
        with torch.device("cpu"):  # transformers has made meta the default device around this call
            handle = _make_handle(manifest, layer, constants.get(layer))
        setattr(module, HANDLE, handle)
        module.config._experts_implementation = EXPERTS_FUNCTION  # type: ignore[union-attr]
        handles.append(handle)
    device = device_of(device_map)
    with torch.device("cpu"):
        products = products_for(device)
    if manifest.dense_precision != "source":
        take_quantised(model, folder, products)
    return Loading(folder, manifest, device, tuple(handles), products)


def _reroute(model: PreTrainedModel, folder: Path, manifest: Manifest) -> None:
    """Close the slots that the routers of the package may not choose."""
    if not manifest.rerouted:
        return
    routers = find_routers(model)
    for layer in manifest.rerouted:
        router, is_open = routers[layer], manifest.open_slots(layer)
        if router.slots != len(is_open) or not can_choose(router.selection, is_open):
            raise PackageError(
                f"The package in {folder} does not match its config.json.",
                f"the router of layer {layer} takes {router.selection.chosen} of its {router.slots} slots, "
                f"the manifest leaves it {sum(is_open)} of {len(is_open)}",
                _AGAIN,
            )
        with torch.device("cpu"):
            reroute(router, is_open)


def finish_loading(model: PreTrainedModel, loading: Loading) -> None:
    """Build the runtime beside the dense weights, as ``model.conmoe``."""
    finish_dense(model, loading.products)
    options = current_options()
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
        progress=options.progress,
    )
    model.conmoe = runtime  # type: ignore[assignment]
    guard_context(model, context, runtime.make_room)
    runtime.fast_path = install(model, runtime.arithmetic.machine, context)  # pyright: ignore[reportAttributeAccessIssue]


def attach_unchanged(
    model: PreTrainedModel, folder: Path, manifest: Manifest, device: torch.device
) -> None:
    """Give a model that was left whole the same face: budget, context and numbers, no
    prototypes.
    """
    finish_loading(model, Loading(folder, manifest, device, (), products_for(device)))


def register_experts_function() -> None:
    """Make ``conmoe`` known as an experts implementation; calling it again does nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if EXPERTS_FUNCTION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, conmoe_experts_forward)


def _make_handle(manifest: Manifest, layer: int, constants: Tensor | None) -> LayerHandle:
    number = {entry.id: i for i, entry in enumerate(manifest.prototypes)}
    slots = manifest.slots[layer]
    scales = torch.tensor([slot.scale for slot in slots], dtype=torch.float32)
    rows = [-1 if slot.constant is None else slot.constant for slot in slots]
    if (constants is None and max(rows) >= 0) or (
        constants is not None and max(rows) >= len(constants)
    ):
        raise PackageError(
            f"{CONSTANTS_FILE} is damaged.",
            f"layer {layer} has fewer constants than its slots name",
            _AGAIN,
        )
    return LayerHandle(
        layer=layer,
        slot_map=torch.tensor(
            [-1 if slot.prototype is None else number[slot.prototype] for slot in slots]
        ),
        scales=None if bool((scales == 1.0).all()) else scales,
        constants=constants if max(rows) >= 0 else None,
        constant_of=torch.tensor(rows) if max(rows) >= 0 else None,
    )


def _read_constants(folder: Path, manifest: Manifest) -> dict[int, Tensor]:
    """Layer -> [C, H] fp32; empty where no slot has a constant."""
    if not any(slot.constant is not None for row in manifest.slots.values() for slot in row):
        return {}
    with torch.device("cpu"):
        return read_constants(folder / CONSTANTS_FILE)


def _check_shapes(
    folder: Path, manifest: Manifest, layer: int, module: nn.Module, names: Sequence[str]
) -> None:
    """The records that this layer uses hold what its experts module expects."""
    wanted: Mapping[str, tuple[int, ...]] = {
        name: tuple(getattr(module, name).shape) for name in names
    }
    slots = manifest.slots[layer]
    count = next(iter(wanted.values()))[0]
    if len(slots) != count:
        raise PackageError(
            f"The package in {folder} does not match its config.json.",
            f"layer {layer} has {count} router slots, the manifest describes {len(slots)}",
            _AGAIN,
        )
    used = {slot.prototype for slot in slots if slot.prototype is not None}
    for layout in sorted({entry.layout for entry in manifest.prototypes if entry.id in used}):
        parts = {part.name: part for part in manifest.layouts[layout].parts}
        transposed = bool(module.is_transposed)
        width = wanted["down_proj"][1 if transposed else 2]
        narrow = min(width, _width(parts, transposed) or width)  # neurons may have been removed
        for name in names:
            shape = narrowed_shape(name, wanted[name][1:], transposed, width, narrow)
            if not _holds(parts, name, shape, transposed):
                held = parts.get(name)
                raise PackageError(
                    f"The package in {folder} does not match its config.json.",
                    f"layer {layer} expects {name} of shape {list(wanted[name][1:])}, its records "
                    f"hold {f'{held.dtype} {list(held.shape)}' if held else 'none'}",
                    _AGAIN,
                )


def _width(parts: Mapping[str, RecordPart], transposed: bool) -> int:
    """Neurons of the experts in a record: the inputs of its down projection; 0 where that is not told."""
    factor = parts.get("down_proj" + RIGHT)
    if factor is not None and len(factor.shape) == 2:
        return factor.shape[1]
    part = parts.get("down_proj")
    if part is None or len(part.shape) != 2:
        return 0
    kind = KIND_OF_VALUES.get(part.dtype)
    if kind is None:
        return part.shape[0 if transposed else 1]
    return part.shape[1] * (2 if kind == "int4" else 1)


def _holds(
    parts: Mapping[str, RecordPart], name: str, shape: tuple[int, ...], transposed: bool
) -> bool:
    """Whether a record has the parameter ``name`` of this shape: plain, quantised or factored."""
    left = parts.get(name + LEFT)
    if left is not None and len(shape) == 2:
        rows, columns = reversed(shape) if transposed else shape
        wanted = factored_parts(name, rows, columns, left.dtype)
        found = [parts[one] for one, _, _ in wanted if one in parts]
        return name not in parts and [(p.name, p.shape, p.dtype) for p in found] == list(wanted)
    part = parts.get(name)
    if part is None:
        return False
    kind = KIND_OF_VALUES.get(part.dtype)
    if kind is None:
        return part.shape == shape and name + SCALE not in parts
    if len(shape) != 2 or name + SCALE not in parts:
        return False
    rows, columns = reversed(shape) if transposed else shape
    if best_kind(rows, columns, kind) != kind:
        return False
    held = [(one.name, one.shape, one.dtype) for one in (part, parts[name + SCALE])]
    return held == list(quantised_parts(name, rows, columns, kind))
