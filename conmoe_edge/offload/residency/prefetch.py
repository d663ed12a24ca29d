"""Reads ahead of the next layer: which prototypes it will probably ask for.

While a layer computes for one token, its hidden state goes through the map that ``fit`` has made for the next MoE
layer (``compress/stream/predictor_fit.py``): one small matrix times a vector. ``Residency`` then reads those of the
likeliest prototypes that are missing, once no read for the layer itself is pending. Only what is resident changes by
it, never a result.

Whether this pays, and how many are read, was decided by ``fit`` for the planned slots (``prefetch_search.py``). It
holds for about as many: while the resident share of the prototypes is further away from the planned one than
``_NEAR``, as with slots that are lent, nothing is read ahead.

Memory on the device: the maps in fp32, ``prefetch_bytes``. Raises ``PackageError`` for a file that is damaged or
belongs to another package.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import PREDICTOR_FILE, Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.small_tensors import Wanted, damaged, read_exactly

_NEAR = 0.10


def prefetch_bytes(manifest: Manifest) -> int:
    """Memory that the maps take where they are used; 0 where nothing is read ahead."""
    if manifest.prefetch is None or not manifest.prefetch.depth:
        return 0
    return 2 * int(manifest.files[PREDICTOR_FILE]["size"])  # bf16 on the disk


class Prefetcher:
    """The maps of a package, on the device."""

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        """Raises ``PackageError`` where the manifest names no predictor, or the file is another's."""
        if manifest.prefetch is None:
            raise damaged(folder / PREDICTOR_FILE, "the manifest names no predictor")
        self._window = manifest.prefetch.window
        self._maps: dict[int, tuple[Tensor, Tensor, list[int]]] = {}
        maps = SlotMap.of_manifest(manifest)
        with torch.device("cpu"):
            found = read_maps(folder, maps)
        for layer, after in pairwise(maps):
            weights = found[after][:-1].T.float().contiguous().to(device)  # [P, H]
            intercept = found[after][-1].float().to(device)
            self._maps[layer] = (weights, intercept, list(maps[after].prototypes))

    def next(self, layer: int, hidden: Tensor) -> list[int]:
        """The prototypes that the MoE layer after ``layer`` will probably ask for, the likeliest first.

        ``hidden``: [1, H] what the experts of ``layer`` get. Empty after the last layer.
        """
        found = self._maps.get(layer)
        if found is None:
            return []
        weights, intercept, numbers = found
        scores = torch.addmv(intercept, weights, hidden[0].float())
        best = scores.topk(min(self._window, len(numbers))).indices.tolist()
        return [numbers[column] for column in best]


def read_maps(
    folder: Path, maps: Mapping[int, SlotMap], hidden: int | None = None
) -> dict[int, Tensor]:
    """Decoder layer -> bf16 [H + 1, P] of every MoE layer but the first, as the package has them.

    Args:
        folder: the package.
        maps: of its MoE layers, ascending; the prototypes of a layer are the columns of its map.
        hidden: H of the model; ``None`` where the caller does not know it: then all have the same.

    Raises:
        PackageError: the file has other tensors, of other shapes or formats, or NaN or infinity.
    """
    path, heights = folder / PREDICTOR_FILE, range(2, 1 << 24) if hidden is None else hidden + 1
    layers = list(maps)[1:]
    wanted = {
        f"predictor.{layer}": Wanted(("BF16",), (heights, len(maps[layer].prototypes)))
        for layer in layers
    }
    found = read_exactly(path, wanted)
    if len({len(one) for one in found.values()}) > 1:
        raise damaged(path, "its maps are for hidden states of different sizes")
    return {layer: found[f"predictor.{layer}"] for layer in layers}


def reads_ahead(manifest: Manifest, resident_share: float) -> bool:
    """Whether reading ahead pays with so many resident prototypes."""
    settings = manifest.prefetch
    if settings is None or not settings.depth or resident_share >= 1:
        return False
    return abs(resident_share - settings.resident_share) <= _NEAR
