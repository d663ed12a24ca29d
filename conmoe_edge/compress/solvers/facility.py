"""Prototypes by greedy facility location on measured errors, and the map that follows. Pure.

    minimise over P, |P| = K:   sum over e of min(R(e), min over p in P of R(e, p))

The gain is monotone and submodular, so taking the best expert K times is within 1 - 1/e of the
best set. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.compress.solvers.slot_errors import SlotErrors

OUTLIER = 10.0
"""An expert whose largest output is this many times the median expert's is a super expert."""


def select(errors: SlotErrors, keep: int, forced: Sequence[int] = ()) -> tuple[int, ...]:
    """``keep`` experts, ascending, those of ``forced`` among them (of too many the first)."""
    left = errors.constant.clone()
    chosen: list[int] = []
    free = torch.ones(len(left), dtype=torch.bool)
    for _ in range(keep):
        gain = (left.unsqueeze(1) - errors.error).clamp(min=0).sum(0)
        gain[~free] = -1.0
        best = forced[len(chosen)] if len(chosen) < len(forced) else int(gain.argmax())
        chosen.append(best)
        free[best] = False
        left = torch.minimum(left, errors.error[:, best])
    return tuple(sorted(chosen))


def strongest(values: Tensor, keep: int, forced: Sequence[int] = ()) -> tuple[int, ...]:
    """The ``keep`` greatest of values [E], ascending, those of ``forced`` among them; ties to the lowest."""
    order = values.argsort(descending=True, stable=True).tolist()
    return tuple(sorted(list(dict.fromkeys([*forced, *order]))[:keep]))


def must_stay(energy: Tensor, peaks: Tensor, keep: int) -> tuple[int, ...]:
    """Experts that are kept whatever the sums say, at most half of ``keep``, from the energy [D, E] and peak [E] of
    their outputs (``RoutedOutputs``).

    Super experts (arXiv 2507.23279): an output ``OUTLIER`` times as large as the median expert's;
    few tokens need them, and the model breaks without. Then, so that no domain of the calibration
    text is lost to larger ones, the expert with the most energy in each domain.
    """
    most = max(1, keep // 2)
    middle = float(peaks.median())
    loud = [e for e in peaks.argsort(descending=True, stable=True).tolist() if middle > 0.0]
    found = [expert for expert in loud if float(peaks[expert]) > OUTLIER * middle]
    for row in energy:
        if float(row.max()) > 0.0:
            found.append(int(row.argmax()))
    return tuple(dict.fromkeys(found))[:most]


def assign(errors: SlotErrors, prototypes: Sequence[int], layer: int = 0) -> SlotMap:
    """Every router slot to its best prototype and scale, or to none where a constant does as well; prototypes go by
    their expert numbers.
    """
    columns = torch.tensor(list(prototypes))
    least, position = errors.error[:, columns].min(1)  # the first of equals
    targets, scales = [], []
    for slot in range(len(errors.constant)):
        prototype = int(columns[position[slot]])
        if slot in prototypes:
            target, scale = slot, 1.0
        elif least[slot] >= errors.constant[slot]:
            target, scale = NONE, 1.0
        else:
            target, scale = prototype, float(errors.scale[slot, prototype])
        targets.append(target)
        scales.append(scale)
    return slot_map_of(layer, targets, scales)


def slot_map_of(layer: int, targets: Sequence[int], scales: Sequence[float] = ()) -> SlotMap:
    """The map of a layer without constants; all scales 1 by default."""
    count = len(targets)
    return SlotMap(layer, tuple(targets), tuple(scales) or (1.0,) * count, (NONE,) * count)


def weights_of(slot_map: SlotMap, slots: Tensor, gates: Tensor) -> Tensor:
    """alpha_p(t) of the map's prototypes, ascending: [T, K] router slots and gates -> [T, P] fp32."""
    column = {number: place for place, number in enumerate(slot_map.prototypes)}
    nothing, count = len(column), len(slot_map)
    target = torch.tensor([column.get(number, nothing) for number in slot_map.targets] + [nothing])
    factor = torch.tensor([*slot_map.scales, 0.0], dtype=torch.float32)
    inside = torch.where((slots >= 0) & (slots < count), slots, count)
    alpha = torch.zeros(len(slots), nothing + 1)
    alpha.scatter_add_(1, target[inside], gates.float() * factor[inside])
    return alpha[:, :nothing]
