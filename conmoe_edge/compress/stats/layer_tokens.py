"""The calibration tokens of one MoE layer as they enter its experts, for methods that compute with them.

``TokenRecorder`` takes them batch by batch while the layer runs. A scope of several layers keeps
those of its earlier layers in the run's work folder until it is decided.

Host memory: T * H in the format of the stream, T * K slots and gates, T * E logits where wanted, of one layer.
``target`` and ``start`` may be streams themselves, and are no copies then. Raises ``NoSpace``; ``CheckpointError``
where a file of an earlier run is damaged.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.compress.work.work_folder import load_as, save_tensors


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """Real tokens only, no padding, in the order of the calibration sequences.

    Attributes:
        hidden: [T, H], the input of the experts.
        slots: [T, K] int64, the router's choice; values outside ``[0, E)`` are skip marks.
        gates: [T, K] fp32.
        logits: [T, E] fp32 of the router, or ``None``.
        target: [T, H], where the routed experts should bring the stream, or ``None``.
        start: [T, H], where the stream is without them; ``None`` for nothing: ``target`` is all that they should give.
        weights: [T] fp32, how much a token's error counts, or ``None`` for all alike.
        factor: [T] fp32, what ``wanted`` is multiplied with, or ``None`` for 1.
        held: [T] bool, the tokens that candidates are measured on and not fitted on, or ``None``.
        domains: [T] int64, the number of each token's domain, or ``None``.
    """

    hidden: Tensor
    slots: Tensor
    gates: Tensor
    logits: Tensor | None = None
    target: Tensor | None = None
    start: Tensor | None = None
    weights: Tensor | None = None
    factor: Tensor | None = None
    held: Tensor | None = None
    domains: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def sample(self, count: int) -> LayerTokens:
        """At most ``count`` tokens, evenly spread over all of them, so over all domains."""
        if count >= len(self):
            return self
        return self.rows(torch.arange(count) * len(self) // count)

    def rows(self, rows: Tensor) -> LayerTokens:
        """Some of the tokens. ``rows`` [n] int64, ascending."""
        found = {name: None if one is None else one[rows] for name, one in self._tensors().items()}
        return LayerTokens(**found)  # type: ignore[arg-type]

    def weighted(self) -> LayerTokens:
        """Gates, and what is wanted, times the weights: a layer's output is linear in its gates, so plain squares over
        these are the weighted squares over the tokens as they are.
        """
        if self.weights is None:
            return self
        gates = self.gates * self.weights.unsqueeze(1)
        return replace(self, gates=gates, weights=None, factor=self.weights)

    def wanted(self) -> Tensor:
        """fp32 [T, H], newly made: what the routed experts should add up to."""
        assert self.target is not None, "these tokens have no target"
        found = self.target.to(torch.float32, copy=True)
        if self.start is not None:
            found -= self.start
        return found if self.factor is None else found.mul_(self.factor.unsqueeze(1))

    def routed(self, slot: int) -> tuple[Tensor, Tensor]:
        """Row numbers [n] and gates [n] of the tokens that chose a slot."""
        rows, places = (self.slots == slot).nonzero(as_tuple=True)
        return rows, self.gates[rows, places]

    def save(self, path: Path) -> None:
        """Keep them in the work folder."""
        named = {name: one for name, one in self._tensors().items() if one is not None}
        save_tensors(path, named)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def load(cls, path: Path) -> LayerTokens:
        """What ``save`` kept; mapped, not read at once."""
        return load_as(cls, path)


class TokenRecorder:
    """Takes what the experts function is called with, batch by batch."""

    def __init__(self) -> None:
        self._hidden: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, hidden: Tensor, slots: Tensor, gates: Tensor, keep: Tensor | None) -> None:
        """hidden [T, H], slots [T, K], gates [T, K] of one batch; ``keep`` [T] marks real tokens."""
        if keep is not None:
            hidden, slots, gates = hidden[keep], slots[keep], gates[keep]
        self._hidden.append(hidden.cpu().clone())
        self._slots.append(slots.cpu().long())
        self._gates.append(gates.float().cpu())

    def add_logits(self, logits: Tensor, keep: Tensor | None) -> None:
        """[T, E] of the same batch."""
        kept = logits if keep is None else logits[keep]
        self._logits.append(kept.float().cpu())

    def result(self) -> LayerTokens:
        """All batches; the recorder gives them up."""
        logits = torch.cat(self._logits) if self._logits else None
        found = LayerTokens(
            torch.cat(self._hidden), torch.cat(self._slots), torch.cat(self._gates), logits
        )
        self.__init__()
        return found
