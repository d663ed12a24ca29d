"""The smallest change that makes a model fit, from the same arithmetic as the plan.

``does_not_fit`` builds the error; each of its values works when it is given: planning with exactly that
budget, that context, or that precision of the dense layers (and its budget), succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conmoe_edge.errors import DoesNotFit
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.dense_precision import stored
from conmoe_edge.plan.needs import Needs, needs_of
from conmoe_edge.plan.placement import Placement, place
from conmoe_edge.plan.plan import Candidate
from conmoe_edge.plan.record_options import constant_bytes
from conmoe_edge.units import parse_size, unit_for

_CONTEXT_STEP = 64
_SHORTEST_CONTEXT = 128


def does_not_fit(
    anatomy: ModelAnatomy, budget: Budget, context: int, candidates: Sequence[Candidate]
) -> DoesNotFit:
    """The error for a budget that none of ``candidates`` meets, not even with one slot a layer."""
    needs = _needs(anatomy, budget, context)
    smallest = min(
        (_at_least(needs, one) for one in candidates), key=lambda placed: placed.least_bytes
    )
    unit = unit_for(smallest.least_bytes)
    parts = [f"{term.name} {unit.text(term.nbytes)}" for term in smallest.terms]
    slots = smallest.least_bytes - sum(term.nbytes for term in smallest.terms)
    parts.append(f"slots {unit.text(slots)}")
    fix = f"--gpu {least_size(smallest.least_bytes)} is the least that works"
    fix += _with_int8(anatomy, budget, context, candidates, smallest.least_bytes)
    shorter = longest_context(anatomy, budget, context, candidates)
    if shorter is not None:
        fix += f"; or --context {shorter}, which fits"
    return DoesNotFit(
        f"{anatomy.architecture} does not fit in {budget.asked}, even with one slot per layer.",
        f"the smallest setting needs {unit.text(smallest.least_bytes)} {unit.name} "
        f"({', '.join(parts)}); the budget is {unit.text(budget.device_bytes)} {unit.name}",
        fix,
        smallest.least_bytes,
    )


def _with_int8(
    anatomy: ModelAnatomy,
    budget: Budget,
    context: int,
    candidates: Sequence[Candidate],
    least: int,
) -> str:
    """What the linear layers in 8 bits would change; empty where they would not."""
    if anatomy.dense_precision != "source":
        return ""
    needs = _needs(stored(anatomy, "int8"), budget, context)
    smaller = min(_at_least(needs, one).least_bytes for one in candidates)
    if smaller >= least:
        return ""
    if smaller <= budget.device_bytes:
        return " so; --dense-precision int8 fits"
    return f" so; with --dense-precision int8 it is --gpu {least_size(smaller)}"


def least_bytes(fits: Callable[[int], bool], start: int) -> int:
    """The fewest bytes that do, looked for from ``start`` on upwards; more never do less."""
    low = high = max(1, start)
    while not fits(high):
        low, high = high, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def least_size(count: int) -> str:
    """``count`` bytes, rounded up to three decimal digits: what can be typed after ``--gpu``."""
    unit, name = (10**9, "GB") if count > 999 * 10**6 else (10**6, "MB")
    digits = 2
    while digits > 0 and count >= unit * 10 ** (3 - digits):
        digits -= 1
    step = unit // 10**digits
    steps = -(-count // step)
    while True:
        text = f"{steps * step / unit:.{digits}f}{name}"
        parsed = parse_size(text)
        assert parsed is not None
        if parsed >= count:
            return text
        steps += 1


def longest_context(
    anatomy: ModelAnatomy, budget: Budget, context: int, candidates: Sequence[Candidate]
) -> int | None:
    """The longest context below ``context`` that fits, in steps of 64 tokens; ``None`` where that
    is too short.
    """

    def fits(tokens: int) -> bool:
        needs = _needs(anatomy, budget, tokens)
        return any(_placed(needs, one, budget.device_bytes).fits for one in candidates)

    # The need grows with the context: search by halves.
    low, high = 0, (context - 1) // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _CONTEXT_STEP) else (low, middle - 1)
    tokens = low * _CONTEXT_STEP
    return tokens if tokens >= _SHORTEST_CONTEXT else None


def _needs(anatomy: ModelAnatomy, budget: Budget, context: int) -> Callable[[Candidate], Needs]:
    """Of a candidate: as ``count_option`` and ``count_free`` have it."""
    plain = needs_of(anatomy, budget.device, context)
    free = needs_of(anatomy, budget.device, context, constants=constant_bytes(anatomy))
    return lambda candidate: free if candidate.bits else plain


def _at_least(needs: Callable[[Candidate], Needs], candidate: Candidate) -> Placement:
    """The placement of a candidate at exactly the least budget that holds it."""
    return _placed(needs, candidate, _placed(needs, candidate, 0).least_bytes)


def _placed(
    needs: Callable[[Candidate], Needs], candidate: Candidate, device_bytes: int
) -> Placement:
    return place(
        needs(candidate),
        device_bytes,
        prototypes=candidate.prototypes,
        record_bytes=candidate.record_bytes,
        pool_bytes=candidate.pool_bytes,
        slot_bytes=-(-candidate.pool_bytes // candidate.prototypes) if candidate.bits else None,
    )
