"""The weights of a layer's prototypes in few bits, while they are solved: gate and up first, each down as it is solved.

The Gram matrix of a prototype's inputs is that of its own tokens, each weighted with its routing weight, and a share of
the layer's mean one. A down projection has that of its activations behind the rounded gate and up.

Peak memory: two [H, H] in fp32, and what ``round_matrix`` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import DOWN, SCALE
from conmoe_edge.checkpoint.format.layout import neurons
from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.checkpoint.format.records import form_of
from conmoe_edge.compress.methods.interface import LayoutOf, Parts, ScopeView
from conmoe_edge.compress.solvers.gram_matrix import gram
from conmoe_edge.compress.solvers.rounding import FED_BACK, inputs_of, round_for, round_matrix
from conmoe_edge.compress.stats.layer_tokens import LayerTokens

COMMON_TOKENS = 2
"""Times the width of a token: how many of a layer's tokens make up its mean Gram matrix."""


@dataclass(slots=True)
class Rounding:
    """Attributes:
    made: what is rounded so far.
    """

    _record: LayoutOf
    _kinds: Mapping[ExpertId, str]
    _transposed: bool
    _hidden: Tensor
    _common: Tensor
    made: dict[ExpertId, dict[str, Matrix]] = field(default_factory=dict)
    _layouts: dict[ExpertId, RecordLayout] = field(default_factory=dict)

    @classmethod
    def of(
        cls, scope: ScopeView, tokens: LayerTokens, gates: Tensor, kinds: Mapping[ExpertId, str]
    ) -> Rounding | None:
        """For a layer, ``kinds`` as of ``Decision``; ``None`` where its records do not have weights in few bits."""
        record = scope.record
        if record is None or not (kinds or feeds_back(record(scope.widths[-1]))):
            return None
        common = common_gram([(tokens.hidden, gates.square().sum(1).sqrt())], len(scope.pool))
        return cls(record, kinds, bool(scope.module.is_transposed), tokens.hidden, common)

    def inputs(self, name: ExpertId, parts: Parts, alpha: Tensor) -> dict[str, Tensor]:
        """Round what a prototype multiplies with the layer's input: everything but its down projection.

        Args:
            name: of the prototype.
            parts: its weights.
            alpha: [T], its routing weight for every token.

        Returns:
            The rounded weights, fp32, as its module keeps them.
        """
        width = neurons(parts[DOWN].shape, self._transposed)
        layout = self._layouts[name] = self._record(width, self._kinds.get(name, ""))
        rows = alpha.nonzero().squeeze(1)
        own = inputs_of(gram(self._hidden[rows], alpha[rows]).unsqueeze(0), self._common)
        self.made[name] = {
            weight: round_for(self._rows(parts[weight]).unsqueeze(0), own, form_of(layout, weight))[
                0
            ]
            for weight in fed_back(layout)
            if weight != DOWN
        }
        return {weight: self._rows(one.dequantise()) for weight, one in self.made[name].items()}

    def outputs(self, names: Sequence[ExpertId]) -> Callable[[int, Tensor, Tensor], Tensor]:
        """What ``refit`` calls for each of ``names``."""

        def rounded(place: int, weight: Tensor, own: Tensor) -> Tensor:
            name = names[place]
            layout = self._layouts[name]
            if DOWN not in fed_back(layout):
                return weight
            matrix = round_matrix(weight, own, form_of(layout, DOWN))
            self.made[name][DOWN] = matrix
            return matrix.dequantise()

        return rounded

    def _rows(self, weight: Tensor) -> Tensor:
        """Between a module's own order and [out, in]; the same way there and back."""
        return weight.T if self._transposed else weight


def feeds_back(layout: RecordLayout) -> bool:
    """Whether records of a layout have weights that are rounded with error feedback."""
    return bool(fed_back(layout))


def fed_back(layout: RecordLayout) -> list[str]:
    """Names of the weights that are rounded with error feedback."""
    named = {part.name for part in layout.parts}
    there = [one.removesuffix(SCALE) for one in sorted(named) if one.endswith(SCALE)]
    return [name for name in there if form_of(layout, name) in FED_BACK]


def common_gram(inputs: Sequence[tuple[Tensor, Tensor]], prototypes: int) -> Tensor:
    """fp32 [H, H]: the mean Gram matrix of a scope's prototypes.

    Taken over at most ``COMMON_TOKENS`` times H tokens of each layer, evenly spread: a share of it is all that is used.

    Args:
        inputs: of every layer the tokens [T, H], and fp32 [T], the root of the sum of a token's squared routing
            weights.
        prototypes: of the scope.
    """
    total: Tensor | float = 0.0
    for hidden, weights in inputs:
        count = len(hidden)
        most = min(count, COMMON_TOKENS * hidden.shape[1])
        rows = torch.arange(most) * count // max(1, most)
        total = total + gram(hidden[rows], weights[rows]) * (count / max(1, most))
    return torch.as_tensor(total) / prototypes
