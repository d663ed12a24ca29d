"""Which prototypes get more bits in a mixed precision.

While a layer runs over the calibration sequences, ``RowSample`` keeps the first hidden rows that the
router sends to each of its slots. For a prototype p, over the sampled rows x of all slots that map
to p and their gates g,

    gain(p) = sum over slots i of (n_i / m_i) * sum over rows of g^2 * (|f_narrow(x) - f(x)|^2 - |f_wide(x) - f(x)|^2)

is the gate-weighted squared output error that the narrow form makes beyond the wide one; n_i rows
came to slot i, m_i of them are in the sum. All wide records of a scope cost the same bytes more
than narrow ones, so the greatest gains are the exact solution of the knapsack.

Peak memory: the sample (at most 64 rows a slot and 256 MiB a layer), one expert twice in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout, SlotRecord
from conmoe_edge.checkpoint.format.records import decode, encode
from conmoe_edge.compress.work.work_folder import load_tensors, save_tensors
from conmoe_edge.model.experts import expert_forward

ROWS = 64
"""Most rows of a slot that are kept, and of a prototype that are computed."""

_MOST_BYTES = 256 << 20


class RowSample:
    """The first rows of each router slot of a layer, first come first kept, so that it is the same on every run."""

    def __init__(self, slots: int, hidden: int) -> None:
        self._limit = max(4, min(ROWS, _MOST_BYTES // (4 * slots * hidden)))
        self._rows: list[list[Tensor]] = [[] for _ in range(slots)]
        self._gates: list[list[Tensor]] = [[] for _ in range(slots)]
        self._kept = [0] * slots
        self._seen = [0] * slots
        self._hidden = hidden

    def add(self, slot: int, gates: Tensor, rows: Tensor, keep: Tensor | None) -> None:
        """gates [n] and rows [n, H] that came to a slot; ``keep`` [n] marks real tokens."""
        if keep is not None:
            gates, rows = gates[keep], rows[keep]
        self._seen[slot] += rows.shape[0]
        room = self._limit - self._kept[slot]
        if room > 0 and rows.shape[0]:
            self._rows[slot].append(rows[:room].float().cpu())
            self._gates[slot].append(gates[:room].float().cpu())
            self._kept[slot] += min(room, rows.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """The sample as tensors: ``rows`` [N, H] slot after slot, ``gates`` [N], ``kept`` and ``seen`` [slots]."""
        nothing = torch.zeros(0, self._hidden)
        return {
            "rows": torch.cat([nothing, *(row for rows in self._rows for row in rows)]),
            "gates": torch.cat([nothing[:, 0], *(one for gates in self._gates for one in gates)]),
            "kept": torch.tensor(self._kept),
            "seen": torch.tensor(self._seen),
        }


def save_sample(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep the sample of a layer until its scope is decided."""
    save_tensors(path, tensors)


def load_sample(path: Path) -> dict[str, Tensor]:
    """What ``save_sample`` kept."""
    return {name: tensor.clone() for name, tensor in load_tensors(path).items()}


def gains(
    module: nn.Module,
    prototypes: Sequence[ExpertId],
    slots: Sequence[SlotRecord],
    pool: Sequence[ExpertId],
    samples: Mapping[int, Mapping[str, Tensor]],
    parts_of: Callable[[ExpertId], Mapping[str, Tensor]],
    layouts: tuple[RecordLayout, RecordLayout],
    dtype: torch.dtype,
    device: torch.device,
) -> list[float]:
    """``gain`` of every prototype of a scope.

    Args:
        module: the experts module of the scope's last layer, for its activation.
        prototypes: in the order of the result.
        slots, pool: one slot record for every expert of the pool.
        samples: layer -> its sample.
        parts_of: a prototype's tensors.
        layouts: the wide records and the narrow ones.
        dtype, device: of the matrix products.
    """
    of: dict[ExpertId, list[tuple[ExpertId, float]]] = {}
    for expert, slot in zip(pool, slots, strict=True):
        if slot.prototype is not None:
            of.setdefault(slot.prototype, []).append((expert, slot.scale))
    bounds = {layer: [0, *sample["kept"].cumsum(0).tolist()] for layer, sample in samples.items()}
    found = []
    for prototype in prototypes:
        members = of.get(prototype, [])
        most = max(1, ROWS // max(1, len(members)))
        rows, factors = [], []
        for (layer, expert), scale in members:
            sample, start = samples[layer], bounds[layer][expert]
            taken = slice(start, min(start + most, bounds[layer][expert + 1]))
            count = taken.stop - taken.start
            if count:
                share = float(sample["seen"][expert]) / count
                rows.append(sample["rows"][taken])
                factors.append(share * (scale * sample["gates"][taken].double()).square())
        if not rows:
            found.append(0.0)
            continue
        parts = {name: part.to(device, dtype) for name, part in parts_of(prototype).items()}
        sampled = torch.cat(rows).to(device)
        found.append(_gain(module, sampled, torch.cat(factors), parts, layouts, dtype))
    return found


def widest(gains_of: Sequence[float], count: int) -> frozenset[int]:
    """The positions of the ``count`` greatest gains; ties go to the lowest."""
    order = sorted(range(len(gains_of)), key=lambda i: (-gains_of[i], i))
    return frozenset(order[:count])


def _gain(
    module: nn.Module,
    rows: Tensor,
    factors: Tensor,
    parts: Mapping[str, Tensor],
    layouts: tuple[RecordLayout, RecordLayout],
    dtype: torch.dtype,
) -> float:
    """rows [n, H], factors [n] -> how much less error the first layout makes than the second."""
    transposed = bool(module.is_transposed)
    exact = expert_forward(module, rows, parts, dtype).double()
    errors = []
    for layout in layouts:
        kept = decode(encode(layout, parts, transposed), dtype, transposed)
        off = expert_forward(module, rows, kept, dtype).double() - exact
        errors.append(float((off.square().sum(-1).cpu() * factors).sum()))
    return errors[1] - errors[0]
