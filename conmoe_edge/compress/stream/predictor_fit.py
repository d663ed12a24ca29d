"""The predictor of the next layer's prototypes, fitted in closed form while a model is streamed.

For each MoE layer after the first, a linear map with intercept goes from what the experts of the MoE layer before got
(x, the hidden state behind that layer's norm) to the router slots of this layer: least squares with a ridge,

    W = (X'X + lambda I)^-1 X'Y,   X and Y centred, the intercept without a penalty,

over the tokens of the routing trace; Y is 1 where the router chose the slot. lambda is ``RIDGE`` times the mean of
|x|^2, whatever the number of tokens: on the demo model that is within a point of the best recall with 16 tokens a
dimension and with 1.5. The map is linear, so its columns may be added up by the reassignment map afterwards: the score
of a prototype is the sum over its slots, the number of them that is expected to be chosen. Prediction from a state that
is there one layer early is known to work with maps as small as this (arXiv 2511.10676 has trained ones); in prototype
space it gets easier, since every slot that leads to the right prototype will do.

Fitted on three quarters of the trace's sequences; the others (``held_sequences``) say how good it is.

``predictor.safetensors``: ``predictor.<layer>`` bf16 [H + 1, P], the last row the intercept, a column for every
prototype of the layer in the order of the prototype numbers. The work folder holds the rows X of one layer at a time
(bf16 [T, H]) and [H + 1, E] a layer. Memory while fitting: X and X'X in fp32, twice. Raises ``NoSpace``;
``CheckpointError`` where a file of an earlier run is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import PREDICTOR_FILE
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile
from conmoe_edge.compress.work.work_folder import load_tensors, save_tensors
from conmoe_edge.plan.trace import Predictions

RIDGE = 1.5
_EVERY = 4


def held_sequences(lengths: Sequence[int]) -> list[bool]:
    """Token by token, whether it is kept from the fit: every fourth sequence, the last of fewer than four, the last
    quarter of a single one.
    """
    if len(lengths) == 1:
        return [i >= lengths[0] - lengths[0] // _EVERY for i in range(lengths[0])]
    last = min(_EVERY, len(lengths)) - 1
    return [number % _EVERY == last for number, length in enumerate(lengths) for _ in range(length)]


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """[n, H], [n, E] in fp32 -> [H + 1, E]: the weights, and the intercept as the last row."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x = x - x_mean
    gram = x.T @ x
    mean_square = float(gram.diagonal().sum()) / len(x)
    gram.diagonal().add_(RIDGE * mean_square or 1.0)  # all rows the same: the intercept alone
    weights = torch.cholesky_solve(x.T @ (y - y_mean), torch.linalg.cholesky(gram))
    return torch.cat([weights, (y_mean - x_mean @ weights).unsqueeze(0)])


def scores(x: Tensor, weights: Tensor) -> Tensor:
    """[n, H], [H + 1, P] -> [n, P]."""
    return x @ weights[:-1] + weights[-1]


class PredictorFit:
    """Fits layer after layer; everything it needs later is durable in the work folder."""

    def __init__(self, work: Path, lengths: Sequence[int], device: torch.device) -> None:
        """``lengths`` of the trace's sequences; the sums run on ``device``."""
        self._work = work
        self._held = torch.tensor(held_sequences(lengths), dtype=torch.bool)
        self._device = device

    def layer(
        self, index: int, before: int | None, hidden: Tensor, slots: Tensor, experts: int
    ) -> None:
        """Fit a layer, and keep its rows for the next.

        Args:
            index: the decoder layer.
            before: the MoE layer before it, which has been here; ``None`` for the first.
            hidden: [T, H] what its experts got, over the tokens of the trace.
            slots: [T, K] router slots; a number of ``experts`` or more is none.
            experts: router slots of the layer.
        """
        for path in self._work.glob("rows-*.safetensors"):
            if before is None or path != self._rows(before):
                path.unlink()  # of an earlier layer: not read again
        if before is not None:
            x = load_tensors(self._rows(before))["rows"].to(self._device).float()
            y = torch.zeros(len(slots), experts + 1, device=self._device)
            y.scatter_(1, slots.to(self._device).long().clamp(0, experts), 1.0)
            held = self._held.to(self._device)
            weights = ridge(x[~held], y[~held, :experts])
            found = {"weights": weights.cpu(), "scores": scores(x[held], weights).cpu()}
            save_tensors(self._part(index), found)
        save_tensors(self._rows(index), {"rows": hidden.to(torch.bfloat16)})

    def write(self, package: Path, maps: Mapping[int, SlotMap]) -> WrittenFile:
        """The file of the package, from the map of every MoE layer."""
        tensors = {}
        for layer in sorted(maps)[1:]:
            columns = _columns(maps[layer])
            weights = load_tensors(self._part(layer))["weights"] @ columns
            tensors[f"predictor.{layer}"] = weights.to(torch.bfloat16)
        return save_tensors(package / PREDICTOR_FILE, tensors)

    def predictions(self, maps: Mapping[int, SlotMap]) -> Predictions:
        """What the predictor says about the tokens that it was not fitted on, from the map of every MoE layer."""
        tokens = tuple(self._held.nonzero().squeeze(1).tolist())
        ranked: list[tuple[tuple[int, ...], ...]] = []
        for position, layer in enumerate(sorted(maps)):
            if position == 0:
                ranked.append(((),) * len(tokens))
                continue
            known = maps[layer].prototypes
            found = load_tensors(self._part(layer))["scores"] @ _columns(maps[layer])
            order = found.sort(dim=1, descending=True, stable=True).indices.tolist()
            ranked.append(tuple(tuple(known[column] for column in row) for row in order))
        return Predictions(tokens, tuple(ranked))

    def _rows(self, layer: int) -> Path:
        return self._work / f"rows-{layer:05d}.safetensors"

    def _part(self, layer: int) -> Path:
        return self._work / f"predictor-{layer:05d}.safetensors"


def _columns(slot_map: SlotMap) -> Tensor:
    """[E, P] fp32: which router slot leads to which of the layer's prototypes."""
    places = {number: column for column, number in enumerate(slot_map.prototypes)}
    columns = torch.zeros(len(slot_map), len(places))
    for slot, number in enumerate(slot_map.targets):
        if number in places:
            columns[slot, places[number]] = 1.0
    return columns
