"""How well one expert stands in for another: errors measured on outputs, scale and constant in closed form. Pure.

For a router slot e with the tokens D_e of a sample, gates g and experts f, and a prototype p, the
slot's output is approximated by s f_p + b. The gate-weighted squared error

    R(e, p) = sum over t in D_e of g^2 |f_e - s f_p - b|^2

is least at  s = <f_e - mu_e, f_p - nu_p> / (|f_p - nu_p|^2 + lambda),  b = mu_e - s nu_p,  with the
g^2-weighted means mu_e, nu_p over D_e and inner products summed over D_e with g^2. A constant alone
leaves R(e) = sum of g^2 |f_e - mu_e|^2. Scales are kept in [0, 1.5], so that no output changes its
sign or grows much on tokens that were not in the sample.

Outputs that are wider than ``SKETCH`` are multiplied with a fixed random matrix [H, SKETCH] of
variance 1 / SKETCH first, which keeps inner products in expectation (Johnson and Lindenstrauss); an
error of some per cent does not change who stands in for whom.

A slot that fewer than ``_FEWEST_TOKENS`` tokens chose is measured on *all* tokens of the sample, as
if one token of a mean gate had come to it: it never outweighs a slot that is used, and still gets
the prototype and the scale (without a constant, R(e) = |f_e|^2) that give most like it.

Peak memory: the outputs of one expert for the sample [m, H], those of the chosen experts
[m, K, SKETCH], and a few [E, E] in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conmoe_edge.compress.stats.layer_tokens import LayerTokens

SAMPLE_TOKENS = 2048
"""Tokens that all experts run on."""

SKETCH = 256
"""Numbers of an output that errors are measured on."""

_LARGEST_SCALE = 1.5
_SEED = 20260529
_RIDGE = 0.02
_FEWEST_TOKENS = 4


@dataclass(frozen=True, slots=True)
class RoutedOutputs:
    """What experts give for the tokens that chose them.

    Attributes:
        energy: [D, E] fp64, sum of g^2 |f_e|^2 over the slot's tokens of every domain (one domain
            where tokens have none).
        peak: [E] fp64, the largest absolute number in the outputs for the slot's tokens.
        outputs: [m, K, SKETCH] fp32, the outputs of the chosen experts (narrow ones as they are);
            ``None`` where no token chose any.
    """

    energy: Tensor
    peak: Tensor
    outputs: Tensor | None


@dataclass(frozen=True, slots=True)
class SlotErrors:
    """What stands in for what, at which price.

    Attributes:
        scale: [E, E] fp64, the best s of slot e (rows) on prototype p (columns); 1 on the diagonal.
        error: [E, E] fp64, R(e, p); 0 on the diagonal.
        constant: [E] fp64, R(e) of a constant alone.
        seen: the outputs of the experts on the tokens of their own slots.
    """

    scale: Tensor
    error: Tensor
    constant: Tensor
    seen: RoutedOutputs


def slot_errors(
    tokens: LayerTokens,
    experts: int,
    forward: Callable[[int, Tensor], Tensor],
    prototypes: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
) -> SlotErrors:
    """Run every prototype on every token of a sample, every slot's expert on its own, and solve for all pairs.

    Args:
        tokens: the sample.
        experts: E.
        forward: (expert, [n, H]) -> its outputs [n, H].
        prototypes: the columns that are wanted, all by default; the others stay 0.
        slots: the rows that are wanted, all by default; the others are undefined, in ``seen`` as well.
    """
    count, width = tokens.slots.shape
    valid = (tokens.slots >= 0) & (tokens.slots < experts)
    visits = int(valid.sum())
    squares = float(tokens.gates[valid].square().sum(dtype=torch.float64))
    share = squares / max(1, visits * count)  # of one token of a mean gate
    if slots is not None:
        valid &= torch.isin(tokens.slots, torch.tensor(list(slots)))
        tokens = replace(tokens, slots=torch.where(valid, tokens.slots, -1))
    seen = routed_outputs(tokens, experts, forward)
    sketched, output = _sketched(tokens.hidden.shape[1]), _on_host(forward)
    scale = torch.eye(experts, dtype=torch.float64)
    error = torch.zeros(experts, experts, dtype=torch.float64)
    if not visits:
        nothing = torch.zeros(experts, dtype=torch.float64)
        return SlotErrors(scale, error, nothing, seen)
    own = seen.outputs
    if own is None:  # no token chose a slot that is wanted
        own = torch.zeros(count, width, min(SKETCH, tokens.hidden.shape[1]))
    slot = tokens.slots.clamp(0, experts - 1).reshape(-1)  # [m K]
    weight = torch.where(valid, tokens.gates.square(), 0.0).double().reshape(-1)

    def by_slot(values: Tensor) -> Tensor:
        """[m K] -> [E], weighted with g^2."""
        return torch.zeros(experts, dtype=torch.float64).index_add_(0, slot, values * weight)

    def mean(rows: Tensor) -> Tensor:
        """[m K, H] -> [E, H], the g^2-weighted mean over each slot's tokens."""
        sums = torch.zeros(experts, rows.shape[1])
        sums.index_add_(0, slot, rows * weight.float().unsqueeze(1))
        return sums / total.clamp(min=1e-30).float().unsqueeze(1)

    total = by_slot(torch.ones(len(slot), dtype=torch.float64))  # G_e
    flat = own.reshape(count * width, -1)
    mu = mean(flat)
    square = by_slot(flat.square().sum(-1).double())
    constant = (square - total * mu.double().square().sum(-1)).clamp(min=0)
    often = torch.bincount(slot[valid.reshape(-1)], minlength=experts) >= _FEWEST_TOKENS
    blind = [one for one in (range(experts) if slots is None else slots) if not often[one]]
    alone = {expert: sketched(output(expert, tokens.hidden)) for expert in blind}
    for expert in blind:
        constant[expert] = share * alone[expert].square().sum(dtype=torch.float64)
    for expert in range(experts) if prototypes is None else prototypes:
        other = alone[expert] if expert in alone else sketched(output(expert, tokens.hidden))
        inner = by_slot(torch.einsum("tkh,th->tk", own, other).reshape(-1).double())
        norm = by_slot(other.square().sum(-1).double().repeat_interleave(width))
        nu = mean(other.repeat_interleave(width, 0))
        inner -= total * (mu * nu).sum(-1).double()
        norm = (norm - total * nu.double().square().sum(-1)).clamp(min=0)
        best = inner / (norm * (1 + _RIDGE)).clamp(min=1e-30)
        best = best.clamp(0.0, _LARGEST_SCALE)
        scale[:, expert] = best
        error[:, expert] = (constant - 2 * best * inner + best.square() * norm).clamp(min=0)
        for other_slot in blind:
            product = share * (alone[other_slot] * other).sum(dtype=torch.float64)
            square_of = share * other.square().sum(dtype=torch.float64)
            one = (product / (square_of * (1 + _RIDGE)).clamp(min=1e-30)).clamp(0, _LARGEST_SCALE)
            scale[other_slot, expert] = one
            left = constant[other_slot] - 2 * one * product + one.square() * square_of
            error[other_slot, expert] = left.clamp(min=0)
    scale.fill_diagonal_(1.0)
    error.fill_diagonal_(0.0)
    return SlotErrors(scale, error, constant, seen)


def routed_outputs(
    tokens: LayerTokens, experts: int, forward: Callable[[int, Tensor], Tensor]
) -> RoutedOutputs:
    """Run every expert on the tokens that chose it. The arguments are those of ``slot_errors``."""
    count, width = tokens.slots.shape
    sketched, output = _sketched(tokens.hidden.shape[1]), _on_host(forward)
    own: Tensor | None = None
    domains = torch.zeros(count, dtype=torch.int64) if tokens.domains is None else tokens.domains
    energy = torch.zeros(int(domains.max()) + 1 if count else 1, experts, dtype=torch.float64)
    peak = torch.zeros(experts, dtype=torch.float64)
    for expert in range(experts):
        rows, places = (tokens.slots == expert).nonzero(as_tuple=True)
        if len(rows):
            out = output(expert, tokens.hidden[rows])
            weighted = tokens.gates[rows, places].square() * out.square().sum(-1)
            energy[:, expert].index_add_(0, domains[rows], weighted.double())
            peak[expert] = float(out.abs().max())
            out = sketched(out)
            if own is None:
                own = torch.zeros(count, width, out.shape[1])
            own[rows, places] = out
    return RoutedOutputs(energy, peak, own)


def _on_host(forward: Callable[[int, Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
    return lambda expert, hidden: forward(expert, hidden).float().cpu()


def _sketched(width: int) -> Callable[[Tensor], Tensor]:
    matrix = sketch(width)
    return lambda out: out if matrix is None else out @ matrix


def sketch(width: int) -> Tensor | None:
    """fp32 [H, SKETCH], the same on every machine; ``None`` where outputs are narrow enough."""
    if width <= SKETCH:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(width, SKETCH, generator=generator) / SKETCH**0.5
