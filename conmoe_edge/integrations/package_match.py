"""Whether manifest and model describe the same thing: layers, router slots, and what the records hold.

Pure. Raises ``PackageError`` that names the layer and the parameter where they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from conmoe_edge.checkpoint.format.forms import (
    KIND_OF_VALUES,
    LEFT,
    SCALE,
    best_kind,
    factored_parts,
    quantised_parts,
)
from conmoe_edge.checkpoint.format.layout import expert_width
from conmoe_edge.checkpoint.format.manifest import Manifest, RecordPart
from conmoe_edge.errors import PackageError
from conmoe_edge.model.anatomy import narrowed_shape
from conmoe_edge.model.rerouting import can_choose
from conmoe_edge.model.router import Selection

AGAIN = "Make the package again with conmoe-edge fit, or copy it again from where it came from."


def mismatch(folder: Path, why: str) -> PackageError:
    """The error for a package whose manifest and ``config.json`` disagree."""
    return PackageError(f"The package in {folder} does not match its config.json.", why, AGAIN)


def check_layers(folder: Path, manifest: Manifest, layers: Iterable[int]) -> None:
    """The manifest maps exactly the ``layers`` of the model that have routed experts."""
    if sorted(layers) != sorted(manifest.slots):
        raise mismatch(
            folder,
            f"the model has routed experts in layers {sorted(layers)}, "
            f"the manifest in {sorted(manifest.slots)}",
        )


def check_selection(
    folder: Path, layer: int, slots: int, selection: Selection, is_open: Sequence[bool]
) -> None:
    """A router that chooses among ``slots`` finds enough of them open."""
    if slots != len(is_open) or not can_choose(selection, is_open):
        raise mismatch(
            folder,
            f"the router of layer {layer} takes {selection.chosen} of its {slots} slots, "
            f"the manifest leaves it {sum(is_open)} of {len(is_open)}",
        )


def check_shapes(
    folder: Path, manifest: Manifest, layer: int, module: nn.Module, names: Sequence[str]
) -> None:
    """The records that this layer uses hold what its experts module expects."""
    wanted: Mapping[str, tuple[int, ...]] = {
        name: tuple(getattr(module, name).shape) for name in names
    }
    slots = manifest.slots[layer]
    count = next(iter(wanted.values()))[0]
    if len(slots) != count:
        raise mismatch(
            folder,
            f"layer {layer} has {count} router slots, the manifest describes {len(slots)}",
        )
    used = {slot.prototype for slot in slots if slot.prototype is not None}
    for layout in sorted({entry.layout for entry in manifest.prototypes if entry.id in used}):
        parts = {part.name: part for part in manifest.layouts[layout].parts}
        transposed = bool(module.is_transposed)
        width = wanted["down_proj"][1 if transposed else 2]
        held_width = expert_width(manifest.layouts[layout], transposed)
        narrow = min(width, held_width or width)  # neurons may have been removed
        for name in names:
            shape = narrowed_shape(name, wanted[name][1:], transposed, width, narrow)
            if not _holds(parts, name, shape, transposed):
                held = parts.get(name)
                raise mismatch(
                    folder,
                    f"layer {layer} expects {name} of shape {list(wanted[name][1:])}, its records "
                    f"hold {f'{held.dtype} {list(held.shape)}' if held else 'none'}",
                )


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
