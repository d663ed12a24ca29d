"""The prototypes of a decided scope rounded with error feedback, whatever method decided it, a few at a time.

A prototype has the Gram matrix of all tokens that come to it through any of its router slots, each weighted with its
routing weight: of the tokens themselves for what it multiplies with them, of its activations behind the rounded weights
for its down projection. Prototypes that few tokens or none come to are rounded by what the scope's other tokens are
like: a share of the mean Gram matrix of its prototypes is added to each, and for down projections, whose neurons are
nobody else's, a share of what the prototype's own activations are on tokens of all kinds.

Where router slots add constants, these are solved once more behind the rounded prototypes: they move by what makes up
best for what rounding changed in the layer's output.

Peak memory: ``_AT_ONCE`` bytes for the matrices that are rounded together (more where one takes more), the inputs of
one prototype's tokens, and the layer's output [T, H] in fp32 where there are constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.forms import DOWN, columns_of
from conmoe_edge.checkpoint.format.manifest import ExpertId, RecordLayout
from conmoe_edge.checkpoint.format.quantise import Matrix
from conmoe_edge.checkpoint.format.records import form_of
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.compress.methods.few_bits import common_gram, fed_back
from conmoe_edge.compress.methods.grouped import layers_of
from conmoe_edge.compress.methods.interface import Decision, Parts, ScopeView
from conmoe_edge.compress.solvers.gram_matrix import gram
from conmoe_edge.compress.solvers.refit import solve_constants
from conmoe_edge.compress.solvers.rounding import round_matrices
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.work.side_by_side import side_by_side
from conmoe_edge.model.experts import Routes, expert_forward, inner_activations
from conmoe_edge.model.slot_tensors import SlotTensors

FEWEST_TOKENS = 32
"""A prototype with fewer tokens is named in a note: its rounding follows the other tokens of its layer."""
_AT_ONCE = 1 << 28
_SAMPLE = 512
"""Tokens of all kinds that a down projection's share is taken on."""
_BATCH = 4096


class RoundedPrototypes:
    """Prototypes in the forms of their records, asked for in the order of ``Decision.prototypes``.

    Args:
        scope: that was decided.
        decision: what was decided; weights that are ``made`` there stay as they are.
        layouts: of every prototype's record.
        tokens: layer -> the tokens that come to the scope's prototypes, with the slots that they choose.
    """

    def __init__(
        self,
        scope: ScopeView,
        decision: Decision,
        layouts: Mapping[ExpertId, RecordLayout],
        tokens: Mapping[int, LayerTokens],
    ) -> None:
        self._scope, self._decision = scope, decision
        self._layouts, self._tokens = layouts, tokens
        self._routes = {layer: self._routed(layer) for layer in tokens}
        self._spread = {layer: _spread(self._routes[layer], len(tokens[layer])) for layer in tokens}
        self._common: Tensor | None = None
        self._ready: dict[ExpertId, tuple[Parts, Mapping[str, Matrix]]] = {}
        # What the method has rounded itself, it has solved its constants for.
        layers = () if decision.made else decision.constants
        self._changed = {layer: torch.zeros(()) for layer in layers if layer in tokens}

    def parts(self, expert: ExpertId) -> Parts:
        """The weights of a prototype before they are rounded."""
        self._reach(expert)
        return self._ready[expert][0]

    def made(self, expert: ExpertId) -> Mapping[str, Matrix]:
        """Its weights in the forms of its record."""
        self._reach(expert)
        return self._ready[expert][1]

    def decision(self) -> Decision:
        """When all have been made: the decision with its constants solved once more, and with notes."""
        constants = dict(self._decision.constants)
        for layer, changed in self._changed.items():
            if changed.dim():
                constants[layer] = constants[layer] + self._correction(layer, changed)
        notes, count = self._decision.notes, len(self._decision.prototypes)
        came = [
            sum(len(_of(routes, number)[0]) for routes in self._routes.values())
            for number in range(count)
        ]
        few = sum(one < FEWEST_TOKENS for one in came)
        if few:
            notes += (
                f"{layers_of(self._scope)}: fewer than {FEWEST_TOKENS} calibration tokens came to {few} of {count} "
                "prototypes; their rounding follows what other tokens are like. --calibration-tokens takes more.",
            )
        return replace(self._decision, constants=constants, notes=notes)

    def _reach(self, expert: ExpertId) -> None:
        if expert in self._ready:
            return
        names, layout = self._decision.prototypes, self._layouts[expert]
        start = names.index(expert)
        most = _at_once(layout)
        together = [expert]
        for other in names[start + 1 : start + most]:
            if self._layouts[other] != layout or self._missing(other) != self._missing(expert):
                break
            together.append(other)
        self._ready = self._round(together)

    def _missing(self, expert: ExpertId) -> list[str]:
        there = self._decision.made.get(expert, {})
        return [name for name in fed_back(self._layouts[expert]) if name not in there]

    def _round(
        self, experts: Sequence[ExpertId]
    ) -> dict[ExpertId, tuple[Parts, Mapping[str, Matrix]]]:
        """Prototypes whose weights are of one shape."""
        of = self._decision.parts or self._scope.weights.parts
        own = {expert: of(expert) for expert in experts}
        made = {expert: dict(self._decision.made.get(expert, {})) for expert in experts}
        missing, layout = self._missing(experts[0]), self._layouts[experts[0]]
        for name in [one for one in missing if one != DOWN]:
            grams = torch.stack(side_by_side(lambda one: gram(*self._inputs(one)), experts))
            self._fill(made, own, name, grams, layout, self._common_inputs())
        if DOWN in missing:
            inside = side_by_side(lambda one: self._inside(one, own[one], made[one]), experts)
            grams, common = (torch.stack(one) for one in zip(*inside, strict=True))
            self._fill(made, own, DOWN, grams, layout, common)
        for expert in experts:
            if self._changed:
                self._add_change(expert, own[expert], made[expert])
        return {expert: (own[expert], made[expert]) for expert in experts}

    def _fill(
        self,
        made: Mapping[ExpertId, dict[str, Matrix]],
        own: Mapping[ExpertId, Parts],
        name: str,
        grams: Tensor,
        layout: RecordLayout,
        common: Tensor,
    ) -> None:
        weights = [self._rows(own[expert][name]).to(self._scope.device).float() for expert in own]
        found = round_matrices(torch.stack(weights), grams, form_of(layout, name), common)
        for expert, matrix in zip(own, found, strict=True):
            made[expert][name] = matrix

    def _common_inputs(self) -> Tensor:
        if self._common is None:
            inputs = [(one.hidden, self._spread[layer]) for layer, one in self._tokens.items()]
            found = common_gram(inputs, len(self._decision.prototypes))
            self._common = found.to(self._scope.device)
        return self._common

    def _inside(
        self, expert: ExpertId, own: Parts, made: Mapping[str, Matrix]
    ) -> tuple[Tensor, Tensor]:
        """The Gram matrix [I, I] of its activations, and that on tokens of all kinds."""
        scope, parts = self._scope, self._changed_parts(own, made)
        width = own[DOWN].shape[0 if scope.module.is_transposed else 1]
        found = torch.zeros(width, width, device=scope.device)
        hidden, weights = self._inputs(expert)
        for rows, alpha in zip(hidden.split(_BATCH), weights.split(_BATCH), strict=True):
            found += gram(inner_activations(scope.module, rows, parts, scope.dtype), alpha)
        common = torch.zeros_like(found)
        for layer, tokens in self._tokens.items():
            most = min(len(tokens), _SAMPLE)
            picked = torch.arange(most) * len(tokens) // max(1, most)
            rows = tokens.hidden[picked].to(scope.device, scope.dtype)
            alpha = self._spread[layer][picked]
            share = len(tokens) / max(1, most) / len(self._decision.prototypes)
            common += gram(inner_activations(scope.module, rows, parts, scope.dtype), alpha) * share
        return found, common

    def _add_change(self, expert: ExpertId, own: Parts, made: Mapping[str, Matrix]) -> None:
        """To what rounding has changed in the outputs of the layers that have constants."""
        scope, number = self._scope, self._decision.prototypes.index(expert)
        moved = {name: part.to(scope.device, scope.dtype) for name, part in own.items()}
        parts = self._changed_parts(own, made)
        for layer, changed in self._changed.items():
            tokens = self._tokens[layer]
            if not changed.dim():
                outputs = self._decision.constants[layer].shape[1]
                self._changed[layer] = changed = torch.zeros(len(tokens), outputs)
            rows, alpha = _of(self._routes[layer], number)
            for some, weights in zip(rows.split(_BATCH), alpha.split(_BATCH), strict=True):
                hidden = tokens.hidden[some].to(scope.device, scope.dtype)
                apart = expert_forward(scope.module, hidden, moved, scope.dtype).float()
                apart -= expert_forward(scope.module, hidden, parts, scope.dtype).float()
                changed.index_add_(0, some, apart.cpu() * weights.unsqueeze(1))

    def _correction(self, layer: int, changed: Tensor) -> Tensor:
        """[C, H]: how far the constants of a layer move."""
        tokens, count = self._tokens[layer], len(self._decision.constants[layer])
        rows = [
            slot.constant
            for expert, slot in zip(self._scope.pool, self._decision.slots, strict=True)
            if expert.layer == layer
        ]
        places = torch.tensor([count if one is None else one for one in rows] + [count])
        inside = torch.where(
            (tokens.slots >= 0) & (tokens.slots < len(rows)), tokens.slots, len(rows)
        )
        gates = torch.zeros(len(tokens), count + 1)
        gates.scatter_add_(1, places[inside], tokens.gates)
        return solve_constants(gates[:, :count].contiguous(), changed)

    def _changed_parts(self, own: Parts, made: Mapping[str, Matrix]) -> dict[str, Tensor]:
        """A prototype's tensors with those that are rounded in their place."""
        scope = self._scope
        found = {name: part.to(scope.device, scope.dtype) for name, part in own.items()}
        for name, matrix in made.items():
            found[name] = self._rows(matrix.dequantise(scope.dtype)).to(scope.device)
        return found

    def _inputs(self, expert: ExpertId) -> tuple[Tensor, Tensor]:
        """The tokens [n, H] that come to a prototype, in the dtype of the computation; routing weights [n]."""
        number, scope = self._decision.prototypes.index(expert), self._scope
        hidden, weights = [], []
        for layer, tokens in self._tokens.items():
            rows, alpha = _of(self._routes[layer], number)
            hidden.append(tokens.hidden[rows].to(scope.device, scope.dtype))
            weights.append(alpha.to(scope.device))
        return torch.cat(hidden), torch.cat(weights)

    def _routed(self, layer: int) -> Routes:
        numbers = {name: number for number, name in enumerate(self._decision.prototypes)}
        slots = [
            slot
            for expert, slot in zip(self._scope.pool, self._decision.slots, strict=True)
            if expert.layer == layer
        ]
        slot_map = SlotMap.of(layer, [replace(one, constant=None) for one in slots], numbers)
        tensors = SlotTensors.of(slot_map, None, torch.device("cpu"))
        return tensors.routes(self._tokens[layer].slots, self._tokens[layer].gates)

    def _rows(self, weight: Tensor) -> Tensor:
        """Between a module's own order and [out, in]; the same way there and back."""
        return weight.T if self._scope.module.is_transposed else weight


def _of(routes: Routes, number: int) -> tuple[Tensor, Tensor]:
    """Rows [n] and routing weights [n] of the tokens that come to a prototype."""
    if number not in routes.prototypes:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    place = routes.prototypes.index(number)
    span = slice(routes.starts[place], routes.starts[place + 1])
    return routes.rows[span], routes.weights[span]


def _spread(routes: Routes, count: int) -> Tensor:
    """fp32 [T]: the root of the sum of every token's squared routing weights."""
    return torch.zeros(count).index_add_(0, routes.rows, routes.weights.square()).sqrt()


def _at_once(layout: RecordLayout) -> int:
    """How many prototypes are rounded together."""
    parts, most = {part.name: part for part in layout.parts}, 0
    for name in fed_back(layout):
        rows = parts[name].shape[0]
        columns = columns_of(form_of(layout, name), parts[name].shape)
        most = max(most, 16 * columns * (rows + columns))
    return max(1, _AT_ONCE // most) if most else 1
