"""The routing trace: the router's choices for a few whole calibration sequences, kept while a model is streamed.

Written as ``routing.safetensors``: ``routing.<layer>`` [T, K] router slots (uint8, or the next wider type where a
layer has more than 255 of them; whatever is no slot is stored as E), ``sequences`` int32 lengths that add up to T.
Only real tokens are there, no padding. One file a layer waits in the work folder until all layers have run, so a
run that was stopped goes on and ends with the same bytes.

Held-out sequences come first: what is tried on them was not also decided by them. Sequences are taken evenly spread,
so every domain has its part.

Host memory: T * K bytes, and 2 * T * H of one layer where the hidden rows are wanted as well. Raises
``NoSpace``; ``CheckpointError`` where a file of an earlier run is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import ROUTING_FILE
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.work.work_folder import load_tensors, save_tensors
from conmoe_edge.plan.trace import MOST_TOKENS


class RoutingRecorder:
    """Takes the router's choices of the tokens that are part of the trace, one layer after the other."""

    def __init__(self, sets: Mapping[str, TokenSet], most: int = MOST_TOKENS) -> None:
        """``sets`` in the order in which sequences are taken from them; ``most`` tokens in all."""
        self._places: dict[str, Tensor] = {}
        self._order = tuple(sets)
        lengths: list[int] = []
        left = most
        for name, tokens in sets.items():
            count, length = tokens.ids.shape
            wanted = min(count, left // length)
            rows = torch.tensor(
                [i * count // wanted for i in range(wanted)], dtype=torch.long
            )  # ascending
            real = torch.zeros_like(tokens.mask)
            real[rows] = tokens.mask[rows]
            self._places[name] = real.reshape(-1).nonzero().squeeze(1)
            lengths += tokens.mask[rows].sum(1).tolist()
            left -= wanted * length
        self._lengths = torch.tensor([n for n in lengths if n], dtype=torch.int32)
        self._set = ""
        self._seen = 0
        self._taken: dict[str, list[Tensor]] = {}
        self._rows: dict[str, list[Tensor]] = {}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sequence of the trace, in its order."""
        return tuple(self._lengths.tolist())

    def start_layer(self) -> None:
        """Forget the layer before."""
        self._taken = {name: [] for name in self._order}
        self._rows = {name: [] for name in self._order}

    def start_set(self, name: str) -> None:
        """The batches of this token set follow, in order."""
        self._set, self._seen = name, 0

    def add(self, index: Tensor, experts: int, hidden: Tensor | None = None) -> None:
        """One batch: [T, K] router slots of every token, padding included, of a layer with ``experts`` of them.

        ``hidden`` [T, H], where it is given, is kept for the same tokens (``taken``).
        """
        places = self._places[self._set]
        here = places[(places >= self._seen) & (places < self._seen + index.shape[0])] - self._seen
        self._seen += index.shape[0]
        if len(here):
            chosen = index[here.to(index.device)].cpu()
            outside = (chosen < 0) | (chosen > experts)
            kind = _narrowest(experts)
            self._taken[self._set].append(chosen.masked_fill(outside, experts).to(kind))
            if hidden is not None:
                rows = hidden[here.to(hidden.device)].to(torch.bfloat16)
                self._rows[self._set].append(rows.cpu())

    def taken(self) -> tuple[Tensor, Tensor]:
        """Of the layer that ran: [T, H] bf16 hidden rows, which are given up, and [T, K] router slots of the trace's
        tokens.
        """
        rows = [piece for name in self._order for piece in self._rows.pop(name)]
        slots = [piece for name in self._order for piece in self._taken[name]]
        return torch.cat(rows), torch.cat(slots)

    def save_layer(self, work: Path, layer: int) -> None:
        """Make the layer's choices durable in the work folder."""
        pieces = [piece for name in self._order for piece in self._taken[name]]
        if pieces:
            save_tensors(_part(work, layer), {f"routing.{layer}": torch.cat(pieces)})

    def write(self, work: Path, package: Path, layers: tuple[int, ...]) -> WrittenFile | None:
        """Put the layers of the work folder together; ``None`` where no sequence was short enough."""
        if not len(self._lengths):
            return None
        tensors = {"sequences": self._lengths}
        for layer in layers:
            tensors.update(load_tensors(_part(work, layer)))
        return save_tensors(package / ROUTING_FILE, tensors)

    def drop(self, work: Path, layers: tuple[int, ...]) -> None:
        """Delete the layers' files; they are in the package now."""
        for layer in layers:
            _part(work, layer).unlink(missing_ok=True)


def _narrowest(experts: int) -> torch.dtype:
    """The narrowest type that holds the slots of a layer and its skip mark, ``experts``."""
    for kind in (torch.uint8, torch.int16):
        if experts <= torch.iinfo(kind).max:
            return kind
    return torch.int32


def _part(work: Path, layer: int) -> Path:
    return work / f"routing-{layer:05d}.safetensors"
