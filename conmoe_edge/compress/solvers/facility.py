"""Prototypes by greedy facility location on measured errors, and the slot records that follow. Pure.

    minimise over P, |P| = K:   sum over e of min(R(e), min over p in P of R(e, p))

The gain is monotone and submodular, so taking the best expert K times is within 1 - 1/e of the
best set. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conmoe_edge.compress.solvers.slot_errors import SlotErrors

OUTLIER = 10.0
"""An expert whose largest output is this many times the median expert's is a super expert."""


def select(errors: SlotErrors, keep: int, forced: Sequence[int] = ()) -> tuple[int, ...]:
    """``keep`` experts, ascending, those of ``forced`` among them (of too many the first)."""
    return tuple(sorted(_greedy(errors, keep, forced)))


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


def _greedy(errors: SlotErrors, keep: int, forced: Sequence[int] = ()) -> list[int]:
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
    return chosen


def assign(errors: SlotErrors, prototypes: Sequence[int]) -> list[tuple[int | None, float]]:
    """For every slot its prototype (``None``: a constant does as well) and scale."""
    columns = torch.tensor(list(prototypes))
    least, position = errors.error[:, columns].min(1)  # the first of equals
    found: list[tuple[int | None, float]] = []
    for slot in range(len(errors.constant)):
        prototype = int(columns[position[slot]])
        if slot in prototypes:
            found.append((slot, 1.0))
        elif least[slot] >= errors.constant[slot]:
            found.append((None, 1.0))
        else:
            found.append((prototype, float(errors.scale[slot, prototype])))
    return found


def weights_of(
    slots: Tensor,
    gates: Tensor,
    mapping: Sequence[tuple[int | None, float]],
    prototypes: Sequence[int],
) -> Tensor:
    """alpha_p(t) = sum of g_i(t) s_i over the chosen slots i that lead to p: [T, K] -> [T, P] fp32."""
    number = {prototype: position for position, prototype in enumerate(prototypes)}
    nothing = len(prototypes)
    target = torch.tensor([nothing if p is None else number[p] for p, _ in mapping] + [nothing])
    factor = torch.tensor([s for _, s in mapping] + [0.0], dtype=torch.float32)
    inside = torch.where((slots >= 0) & (slots < len(mapping)), slots, len(mapping))
    alpha = torch.zeros(len(slots), nothing + 1)
    alpha.scatter_add_(1, target[inside], gates.float() * factor[inside])
    return alpha[:, :nothing]
