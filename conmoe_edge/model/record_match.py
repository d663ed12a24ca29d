"""Whether the records of a package hold what the experts module of a layer expects: exactly its parameters, each in a
form that is known, in the shapes of the module.

Pure: looks at layouts and at the shapes of a module on any device. Raises ``PackageError`` that names the layer and the
parameter where they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from conmoe_edge.checkpoint.format.forms import (
    LEFT,
    SCALE,
    Part,
    best_kind,
    factored_parts,
    grid_of,
    kind_of,
    quantised_parts,
)
from conmoe_edge.checkpoint.format.layout import expert_width
from conmoe_edge.checkpoint.format.manifest import Manifest, RecordPart
from conmoe_edge.errors import PackageError
from conmoe_edge.model.anatomy import narrowed_shape

AGAIN = "Make the package again with conmoe-edge fit, or copy it again from where it came from."
PLAIN_FORMATS = ("bfloat16", "float16", "float32")
"""Number formats of weights that are not quantised: those that every backend computes with."""


def mismatch(folder: Path, why: str) -> PackageError:
    """The error for a package whose manifest and ``config.json`` disagree."""
    return PackageError(f"The package in {folder} does not match its config.json.", why, AGAIN)


def token_size(folder: Path, modules: Iterable[nn.Module]) -> int:
    """Numbers of a token as the experts of every layer get it: the model's hidden size, or that of a latent space.

    Args:
        folder: for errors.
        modules: the experts of every layer that has some.

    Raises:
        PackageError: layers differ.
    """
    found: set[int] = set()
    for module in modules:
        down: Any = module.down_proj
        found.add(int(down.shape[2 if module.is_transposed else 1]))
    if len(found) != 1:
        raise mismatch(
            folder, f"experts of different layers take {sorted(found)} numbers of a token"
        )
    return found.pop()


def check_records(
    folder: Path, manifest: Manifest, layer: int, module: nn.Module, names: Sequence[str]
) -> None:
    """The records that this layer uses, and those of its own experts, hold what its experts module expects."""
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
    transposed = bool(module.is_transposed)
    width = wanted["down_proj"][1 if transposed else 2]
    for layout in sorted(
        {one.layout for one in manifest.prototypes if one.id in used or one.id.layer == layer}
    ):
        parts = {part.name: part for part in manifest.layouts[layout].parts}
        held_width = expert_width(manifest.layouts[layout], transposed)
        narrow = min(width, held_width or width)  # neurons may have been removed
        known: set[str] = set()
        for name in names:
            shape = narrowed_shape(name, wanted[name][1:], transposed, width, narrow)
            held = _held(parts, name, shape, transposed)
            if held is None:
                part = parts.get(name) or parts.get(name + LEFT)
                raise mismatch(
                    folder,
                    f"layer {layer} expects {name} of shape {list(wanted[name][1:])}, its records "
                    f"hold {f'{part.dtype} {list(part.shape)}' if part else 'none'}",
                )
            known.update(held)
        for name in sorted(set(parts) - known):
            raise mismatch(
                folder, f"the records of layer {layer} hold {name!r:.80}, which it has not"
            )


def _held(
    parts: Mapping[str, RecordPart], name: str, shape: tuple[int, ...], transposed: bool
) -> list[str] | None:
    """The names of the parts that are the parameter ``name`` of this shape, plain, quantised or factored; ``None``
    where a record does not have it.
    """
    rows, columns = (reversed(shape) if transposed else shape) if len(shape) == 2 else (0, 0)
    left, part = parts.get(name + LEFT), parts.get(name)
    wanted: tuple[Part, ...]
    if left is not None:
        if len(shape) != 2 or part is not None or left.dtype not in PLAIN_FORMATS:
            return None
        wanted = factored_parts(name, rows, columns, left.dtype)
    elif part is None:
        return None
    elif part.dtype in PLAIN_FORMATS:
        if name + SCALE in parts:
            return None
        wanted = ((name, shape, part.dtype),)
    else:
        scales = parts.get(name + SCALE)
        kind = grid = None
        if scales is not None:
            formats = (part.dtype, part.shape), (scales.dtype, scales.shape)
            kind, grid = kind_of(*formats), grid_of(*formats)
        if kind is None or len(shape) != 2 or best_kind(rows, columns, kind) != kind:
            return None
        wanted = quantised_parts(name, rows, columns, kind, grid)
    found = [parts[one] for one, _, _ in wanted if one in parts]
    if [(one.name, one.shape, one.dtype) for one in found] != list(wanted):
        return None
    return [one.name for one in found]
