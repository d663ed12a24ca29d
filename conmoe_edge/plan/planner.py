"""From a model and a budget to a plan: the least lossy levers that meet the budget.

1. A model that fits as it is stays as it is: rate 0, every expert resident.
2. Otherwise the mildest combination whose resident share reaches ``min_resident`` (0.8 to prefer
   quality, 1.0 to prefer speed): the checkpoint's own numbers, bf16, 8 bits. Behind these a method
   that trims spends the bytes that leave every prototype resident where they are worth most, bits and
   neurons together (``bits_ladder.py``). For others fewer bits come before fewer experts: 8 and 4
   bits, 4 bits, then the rates, in the narrowest of these.
3. Where nothing down to 2 bits a weight, or up to a rate of 50 %, reaches that, it is taken and the
   rest stays offloaded: too little memory then costs speed. More goes only where it is asked for.

Forced levers are obeyed, also when they make the model slow. A larger budget never gives a higher
rate or, at the same rate, fewer slots.
Raises ``DoesNotFit`` with the least budget that works (and a shorter context that does),
``UsageError`` for a context that the model cannot read, ``UnsupportedModel`` for a model without routed
experts.
"""

from __future__ import annotations

from dataclasses import replace

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.all_resident import not_all_resident
from conmoe_edge.plan.bits_ladder import fast_enough, free_options, ladder
from conmoe_edge.plan.candidate import Option, count_option
from conmoe_edge.plan.dense_precision import stored
from conmoe_edge.plan.free_bytes import count_free
from conmoe_edge.plan.kv_precision import with_kv
from conmoe_edge.plan.least import does_not_fit
from conmoe_edge.plan.levers import AUTO_RATE_LIMIT, RATE_GRID, precisions
from conmoe_edge.plan.placement import Placement
from conmoe_edge.plan.plain_widths import choose_width
from conmoe_edge.plan.plan import Candidate, Plan
from conmoe_edge.plan.reasons import explain, is_unchanged
from conmoe_edge.plan.request import DEFAULT_CONTEXT, PlanRequest, check_positions
from conmoe_edge.plan.serving import PLAIN, WHOLE
from conmoe_edge.plan.unasked_formats import choose_formats

_BEFORE_FREE = ("source", "mxfp4", "bf16", "int8")
"""What comes before free prototypes, every expert kept; and int4, of experts that are published in it."""


def make_plan(
    anatomy: ModelAnatomy,
    budget: Budget,
    request: PlanRequest | None = None,
    *,
    trims: bool = False,
) -> Plan:
    """Decide.

    Args:
        anatomy: of the model.
        budget: what ``request.budget`` means.
        request: what was asked; by default nothing.
        trims: whether the method removes neurons as well as experts.
    """
    request = request or PlanRequest()
    if not anatomy.moe_layers:
        raise UnsupportedModel(
            f"{anatomy.architecture} has no routed experts.",
            "there is nothing to consolidate in a dense model",
            "Choose a Mixture-of-Experts model",
        )
    if "auto" in (request.dense_precision, request.kv_precision):
        asked = request

        def plan_in(dense: str, kv: str) -> Plan:
            changed = replace(asked, dense_precision=dense, kv_precision=kv)
            return make_plan(anatomy, budget, changed, trims=trims)

        return choose_formats(anatomy, asked, plan_in)
    anatomy = with_kv(stored(anatomy, request.dense_precision), request.kv_precision)
    tokens = _checked_context(anatomy, request.context)
    if request.engine in PLAIN:
        trims = True
        candidate, explained, placement = choose_width(anatomy, budget, tokens, request)
    else:
        candidate, explained, placement = _choose_levers(
            anatomy, budget, tokens, request, trims=trims
        )
    return Plan(
        budget=budget,
        context=tokens,
        prefill_chunk=placement.prefill_chunk,
        terms=placement.terms,
        left_for_prototypes=placement.left_for_prototypes,
        chosen=candidate,
        candidates=explained,
        unchanged=is_unchanged(anatomy, candidate),
        disk_bytes=anatomy.dense_bytes + candidate.pool_bytes,
        scratch_bytes=_scratch_bytes(anatomy, candidate, request.tokens, trims=trims),
        prefer=request.prefer,
        dense_precision=request.dense_precision,
        kv_precision=request.kv_precision,
    )


def _scratch_bytes(anatomy: ModelAnatomy, candidate: Candidate, tokens: int, *, trims: bool) -> int:
    """Hidden states in fp32 of every stream; and, once in the work folder and once in the package, the constants of all
    slots in bf16, and the predictor with the rows in bf16 that it is fitted on, of two layers.
    """
    hidden = anatomy.hidden_size
    slots = sum(one.experts.count for one in anatomy.moe_layers if one.experts)
    found = (4 if trims else 2) * tokens * hidden * 4
    if trims:
        found += 2 * slots * hidden * 2
    if candidate.resident_share < 1:
        found += slots * (hidden + 1) * (4 + 2) + 2 * tokens * hidden * 2
    return found


def _choose_levers(
    anatomy: ModelAnatomy, budget: Budget, tokens: int, request: PlanRequest, *, trims: bool
) -> tuple[Candidate, tuple[Candidate, ...], Placement]:
    """The combination that is taken, all that were looked at, and how the memory is divided with the first."""
    if request.free:
        options = free_options(anatomy, budget, tokens, request)
    else:
        names = precisions(anatomy, request.precision)
        chooses = trims and request.chooses_bytes
        if chooses:
            names = tuple(name for name in names if name in _BEFORE_FREE) or names
        combinations = [(name, 0.0) for name in names]
        if not chooses:
            combinations = _combinations(names, request.forced_rate)
        options = [
            count_option(anatomy, budget, tokens, name, rate, request, trims=trims)
            for name, rate in combinations
        ]
        if chooses:
            options = ladder(anatomy, budget, tokens, request, options)
    if request.engine in WHOLE:
        options = [replace(one, allowed=one.allowed and one.meets) for one in options]
    chosen = _choose(options)
    if chosen is None and request.engine in WHOLE:
        raise not_all_resident(anatomy, budget, tokens, request, trims=trims)
    if chosen is None:
        allowed = [option.candidate for option in options if option.allowed]
        raise does_not_fit(anatomy, budget, tokens, allowed)
    if request.min_speed is not None:

        def count(pool: int) -> Option:
            return count_free(anatomy, budget, tokens, request, pool=pool)

        chosen = fast_enough(anatomy, options, chosen, request.min_speed, count)
        if chosen not in options:
            options = [*options, chosen]
    explained = tuple(explain(anatomy, budget, option, chosen, request) for option in options)
    return explained[options.index(chosen)], explained, chosen.placement


def _combinations(names: tuple[str, ...], rate: float | None) -> list[tuple[str, float]]:
    """Precision and rate, mildest first: every precision at rate 0, then the narrowest at the rates
    of the grid.

    With a forced rate the milder ones are looked at for comparison, and the rate itself in every
    precision.
    """
    limit = AUTO_RATE_LIMIT if rate is None else rate
    combined = [(name, 0.0) for name in names]
    combined += [(names[-1], step) for step in RATE_GRID if 0.0 < step <= limit and step != rate]
    if rate:
        combined += [(name, rate) for name in names]
    return combined


def _choose(options: list[Option]) -> Option | None:
    """The mildest allowed option that meets what was asked, else the one that removes most, else
    nothing.
    """
    fitting = [option for option in options if option.allowed and option.placement.fits]
    for option in fitting:
        if option.meets:
            return option
    return fitting[-1] if fitting else None


def _checked_context(anatomy: ModelAnatomy, context: int | None) -> int:
    if context is None:
        return min(DEFAULT_CONTEXT, anatomy.max_context)
    check_positions(context, anatomy.max_context, anatomy.architecture)
    return context
