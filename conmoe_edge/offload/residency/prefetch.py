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

from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import PREDICTOR_FILE, Manifest
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.fs.contained import path_inside
from conmoe_edge.errors import CheckpointError, PackageError

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
            raise _damaged(folder, "the manifest names no predictor")
        self._window = manifest.prefetch.window
        self._maps: dict[int, tuple[Tensor, Tensor, list[int]]] = {}
        try:
            with torch.device("cpu"):
                tensors = load_file(path_inside(folder, PREDICTOR_FILE))
        except (OSError, SafetensorError, CheckpointError) as error:
            raise _damaged(folder, str(error)[:200]) from error
        maps = SlotMap.of_manifest(manifest)
        heights = {tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 2}
        for layer, after in pairwise(maps):
            known = list(maps[after].prototypes)
            found = tensors.get(f"predictor.{after}")
            if found is None or len(heights) != 1 or found.shape[1:] != (len(known),):
                raise _damaged(folder, f"it does not predict the prototypes of layer {after}")
            weights = found[:-1].T.float().contiguous().to(device)  # [P, H]
            self._maps[layer] = (weights, found[-1].float().to(device), known)

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


def reads_ahead(manifest: Manifest, resident_share: float) -> bool:
    """Whether reading ahead pays with so many resident prototypes."""
    settings = manifest.prefetch
    if settings is None or not settings.depth or resident_share >= 1:
        return False
    return abs(resident_share - settings.resident_share) <= _NEAR


def _damaged(folder: Path, why: str) -> PackageError:
    return PackageError(
        f"{folder / PREDICTOR_FILE} is damaged.",
        why,
        "Make the package again with conmoe-edge fit, or copy it again from where it came from.",
    )
