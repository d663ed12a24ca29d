"""The prototypes of a layer trimmed and refitted for a given map, and the error that is left.

``rebuild`` removes the neurons of every prototype that its router slots miss least (``neuron_pruning.py``), then solves
the down projections and the constants of the layer together against its target (``refit.py``). ``error_on`` measures a
decision on any tokens.

Peak memory: the activations of all routed tokens at the widths that stay (sum of n_p * I'), those of one
prototype before it is trimmed, and what ``refit`` takes. Of a prototype only the new down projection is held; its other
weights are taken from the pretrained ones when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.format.slot_map import NONE, SlotMap
from conmoe_edge.compress.methods.few_bits import Rounding
from conmoe_edge.compress.methods.interface import Decision, Parts, ScopeView
from conmoe_edge.compress.solvers.facility import weights_of
from conmoe_edge.compress.solvers.gram_matrix import gram as gram_of
from conmoe_edge.compress.solvers.neuron_pruning import corrected, surviving, take_neurons
from conmoe_edge.compress.solvers.refit import Features, refit
from conmoe_edge.compress.stats.layer_tokens import LayerTokens
from conmoe_edge.compress.stream.expert_hooks import MappedTap, expert_sum
from conmoe_edge.compress.stream.layer_stream import compute_dtype
from conmoe_edge.compress.work.side_by_side import side_by_side
from conmoe_edge.model.experts import inner_activations


@dataclass(frozen=True, slots=True)
class StandIns:
    """Who stands for whom in one layer.

    Attributes:
        slot_map: every router slot's prototype, by its expert number, and scale; no constants yet.
        neurons: those that a prototype keeps, int64, ascending; where it is not named, they are looked for among its
            own, as many as the scope allows.
        kinds: of the record of every prototype, where they have kinds of their own.
    """

    slot_map: SlotMap
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    kinds: Mapping[int, str] = field(default_factory=dict)

    @property
    def prototypes(self) -> tuple[int, ...]:
        """Expert numbers, ascending."""
        return self.slot_map.prototypes


def rebuild(
    scope: ScopeView,
    tokens: LayerTokens,
    chosen: StandIns,
    grams: list[Tensor] | None = None,
) -> Decision:
    """Prototypes with all that is solved for them, fitted on ``tokens``.

    ``grams``: the Gram matrix of ``activations`` of every expert of the pool, weighted with its own gates, on some
    tokens, where neurons are chosen: down projections start from what makes up for the others there. Used up.
    """
    layer = scope.layers[0].layer
    gates = gates_of(tokens, len(scope.pool))
    alpha = weights_of(chosen.slot_map, tokens.slots, tokens.gates)
    kinds = {scope.pool[expert]: kind for expert, kind in chosen.kinds.items()}
    rounding = Rounding.of(scope, tokens, gates, kinds)

    def trimmed(item: tuple[int, int]) -> tuple[Tensor, Tensor, Features]:
        position, expert = item
        known, weights = chosen.neurons.get(expert), alpha[:, position]
        whole = None
        if grams is None:
            whole = activations(scope, tokens, expert, weights)
            neurons, weight = solved(scope, expert, whole.gram, known)
        else:
            neurons, weight = solved(scope, expert, grams[expert], known)
            grams[expert] = torch.empty(0)
        if rounding is not None:
            own = _with_neurons(scope, expert, neurons)
            instead = rounding.inputs(scope.pool[expert], own, weights)
            return neurons, weight, activations(scope, tokens, expert, weights, neurons, instead)
        if whole is not None:
            return neurons, weight, whole.of(neurons)
        return neurons, weight, activations(scope, tokens, expert, weights, neurons)

    found = side_by_side(trimmed, enumerate(chosen.prototypes))
    kept = [neurons for neurons, _, _ in found]
    down = [weight for _, weight, _ in found]
    features = [own for _, _, own in found]
    del found  # down projections are held by their list alone, which gives them up
    names = [scope.pool[expert] for expert in chosen.prototypes]
    constants: Mapping[int, Tensor] = {}
    left = None
    adding = _adding(scope, chosen, rounded=rounding is not None)
    if not scope.module.has_post_expert_norm:
        left = _target(scope, tokens, alpha, chosen.prototypes)
        rounded = None if rounding is None else rounding.outputs(names)
        down, table = refit(
            *(features, _used_up(down), gates[:, adding], left),
            constants=bool(adding),
            rounded=rounded,
        )
        constants = {layer: table} if adding else {}
    slots = tuple(
        SlotRecord(
            None if expert == NONE else scope.pool[expert],
            scale,
            adding.index(slot) if constants and slot in adding else None,
        )
        for slot, (expert, scale) in enumerate(
            zip(chosen.slot_map.targets, chosen.slot_map.scales, strict=True)
        )
    )
    solution = dict(zip(names, zip(chosen.prototypes, kept, down, strict=True), strict=True))

    def parts(name: ExpertId) -> Parts:
        return with_down(scope, *solution[name])

    widths = {name: len(neurons) for name, neurons in zip(names, kept, strict=True)}
    made = {} if rounding is None else {name: rounding.made[name] for name in names}
    return Decision(
        *(tuple(names), slots, constants),
        parts=parts,
        made=made,
        widths=widths,
        kinds=kinds,
        left=left,
    )


def _used_up(values: list[Tensor]) -> Iterator[Tensor]:
    """All of them, each held by nobody else once it is given."""
    while values:
        yield values.pop(0)


def _adding(scope: ScopeView, chosen: StandIns, *, rounded: bool) -> list[int]:
    """The slots that add constants. In few bits only those whose experts have gone: the others' constants are worth
    less than the bytes that they take.
    """
    if not scope.constants:
        return []
    targets = chosen.slot_map.targets
    return [slot for slot, target in enumerate(targets) if not rounded or target != slot]


def error_on(scope: ScopeView, tokens: LayerTokens, decision: Decision) -> float:
    """Squared distance of the layer's routed output to its target, summed over ``tokens``."""
    parts_of = decision.parts or scope.weights.parts
    parts = {
        expert: {name: one.to(scope.device) for name, one in parts_of(expert).items()}
        for expert in decision.prototypes
    }
    layer = scope.layers[0].layer
    tap = MappedTap.of(decision.slots, parts, decision.constants.get(layer), layer)
    given = expert_sum(scope.module, tap, tokens, scope.device)
    return float((given.float() - tokens.wanted()).square().sum(dtype=torch.float64))


def whole_parts(scope: ScopeView, expert: int) -> dict[str, Tensor]:
    """One pretrained expert in the dtype and on the device of the computation."""
    return _moved(scope, scope.weights.parts(scope.pool[expert]))


def _moved(scope: ScopeView, parts: Parts) -> dict[str, Tensor]:
    return {name: part.to(scope.device, scope.dtype) for name, part in parts.items()}


def whole_width(scope: ScopeView) -> int:
    """Neurons of a pretrained expert."""
    down = scope.weights.parts(scope.pool[0])["down_proj"]
    return down.shape[0 if scope.module.is_transposed else 1]


def gates_of(tokens: LayerTokens, experts: int) -> Tensor:
    """fp32 [T, E]: the gate of every slot that a token chose, 0 elsewhere."""
    inside = torch.where((tokens.slots >= 0) & (tokens.slots < experts), tokens.slots, experts)
    gates = torch.zeros(len(tokens), experts + 1)
    gates.scatter_add_(1, inside, tokens.gates)
    return gates[:, :experts].contiguous()


def activations(
    scope: ScopeView,
    tokens: LayerTokens,
    expert: int,
    alpha: Tensor,
    neurons: Tensor | None = None,
    instead: Parts | None = None,
) -> Features:
    """Neurons of a pretrained expert on the tokens where its routing weight ``alpha`` [T] is not 0; all by default.

    ``instead``: weights that have taken the place of its own.
    """
    rows = alpha.nonzero().squeeze(1)
    hidden = tokens.hidden[rows].to(scope.device, scope.dtype)
    parts = _moved(scope, {**_with_neurons(scope, expert, neurons), **(instead or {})})
    values = inner_activations(scope.module, hidden, parts, scope.dtype).cpu()  # [n, I]
    values = values.to(compute_dtype(values.device, scope.dtype))
    return Features(rows, values, alpha[rows], gram_of(values, alpha[rows]))


def down_rows(scope: ScopeView, expert: int) -> Tensor:
    """fp32 [H, I] on the host: the down projection of a pretrained expert."""
    return _as_rows(scope, scope.weights.parts(scope.pool[expert])["down_proj"]).float().cpu()


def solved(
    scope: ScopeView, expert: int, gram: Tensor, neurons: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The neurons that stay and the down projection fp32 [H, n] that makes up for the others.

    ``gram`` [I, I]: of all its activations. ``neurons``: where it is known which stay.
    """
    down = down_rows(scope, expert)
    if neurons is None:
        return surviving(gram, down, scope.widths[-1])
    return neurons, corrected(gram, down, neurons)


def with_down(scope: ScopeView, expert: int, neurons: Tensor, down: Tensor) -> Parts:
    """An expert with these neurons only, and with another down projection [H, n]."""
    return {**_with_neurons(scope, expert, neurons), "down_proj": _as_rows(scope, down)}


def _with_neurons(scope: ScopeView, expert: int, neurons: Tensor | None) -> Parts:
    """A pretrained expert with some of its neurons; its own weights, not a copy, where that is all of them."""
    parts = scope.weights.parts(scope.pool[expert])
    if neurons is None or len(neurons) == whole_width(scope):
        return parts
    return take_neurons(scope.module, parts, neurons)


def _as_rows(scope: ScopeView, down: Tensor) -> Tensor:
    """Between a module's own layout of the down projection and [H, I]; the same way there and back."""
    return down.T if scope.module.is_transposed else down


def _target(scope: ScopeView, tokens: LayerTokens, alpha: Tensor, experts: Sequence[int]) -> Tensor:
    """fp32 [T, H], a copy: what the down projections have to give, biases taken off."""
    target = tokens.wanted()
    biases = [scope.weights.parts(scope.pool[one]).get("down_proj_bias") for one in experts]
    there = [one.float().cpu() for one in biases if one is not None]
    if there:
        target.addmm_(alpha, torch.stack(there), alpha=-1.0)
    return target
