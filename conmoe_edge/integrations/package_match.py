"""Whether manifest and model describe the same thing: layers, and router slots that may be chosen.

Pure; ``model/record_match.py`` looks at the records. Raises ``PackageError`` that names the layer where they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.model.record_match import mismatch
from conmoe_edge.model.rerouting import can_choose
from conmoe_edge.model.router import Selection


def check_layers(folder: Path, manifest: Manifest, layers: Iterable[int]) -> None:
    """The manifest maps exactly the ``layers`` of the model that have routed experts."""
    if sorted(layers) != sorted(manifest.slots):
        raise mismatch(
            folder,
            f"the model has routed experts in layers {sorted(layers)}, "
            f"the manifest in {sorted(manifest.slots)}",
        )


def check_choice(folder: Path, manifest: Manifest, chosen: int) -> None:
    """Every router has as many slots as a token is to be sent to, ``chosen`` by the config."""
    for layer, row in sorted(manifest.slots.items()):
        if not 1 <= chosen <= len(row):
            raise mismatch(
                folder,
                f"a token is sent to {chosen} router slots, and layer {layer} has {len(row)}",
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
