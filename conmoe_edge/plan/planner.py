"""From a model and a budget to a plan: the least lossy levers that meet the budget.

1. A model that fits as it is stays as it is: rate 0, every expert resident.
2. Otherwise the mildest combination whose resident share reaches ``min_resident`` (0.8 to prefer
   quality, 1.0 to prefer speed) and whose estimated speed reaches ``speed_floor``, if given. Fewer
   bits come before fewer experts: the checkpoint's own numbers, bf16, 8 bits, 8 and 4 bits, 4 bits,
   then the rates, in the narrowest of these.
3. Where nothing up to a rate of 50 % reaches that, 50 % is taken and the rest stays offloaded:
   too little memory then costs speed. More than half is removed only by an explicit rate.

Forced levers are obeyed, also when they make the model slow. A larger budget never gives a higher
rate or, at the same rate, fewer slots.
Raises ``DoesNotFit`` with the least budget that works (and a shorter context that does),
``UsageError`` for nonsense, ``UnsupportedModel`` for a model without routed experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from conmoe_edge.errors import UnsupportedModel, UsageError
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.candidate import Option, Wishes, count_option
from conmoe_edge.plan.dense_precision import stored
from conmoe_edge.plan.least import does_not_fit
from conmoe_edge.plan.levers import (
    AUTO_RATE_LIMIT,
    AUTO_SCOPE,
    RATE_GRID,
    check_rate,
    check_scope,
    precisions,
)
from conmoe_edge.plan.plan import Plan, Preference
from conmoe_edge.plan.reasons import explain, is_unchanged

DEFAULT_CONTEXT = 4096
DEFAULT_CALIBRATION_TOKENS = 64 * 512
_MIN_RESIDENT: dict[Preference, float] = {"quality": 0.8, "speed": 1.0}


def make_plan(
    anatomy: ModelAnatomy,
    budget: Budget,
    *,
    context: int | None = None,
    rate: float | Literal["auto"] = "auto",
    scope: int | Literal["auto"] = "auto",
    precision: str = "auto",
    dense_precision: str = "source",
    prefer: Preference = "quality",
    min_resident: float | None = None,
    speed_floor: float | None = None,
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS,
    trims: bool = False,
    equal: bool = False,
) -> Plan:
    """Decide. ``context`` is 4096 tokens, or the model's longest where that is shorter, when
    ``None``. ``trims``: the method removes neurons as well as experts; ``equal``: from all alike.
    """
    if not anatomy.moe_layers:
        raise UnsupportedModel(
            f"{anatomy.architecture} has no routed experts.",
            "there is nothing to consolidate in a dense model",
            "Choose a Mixture-of-Experts model",
        )
    anatomy = stored(anatomy, dense_precision)
    tokens = _checked_context(anatomy, context)
    wishes = _wishes(rate, precision, prefer, min_resident, speed_floor, budget)
    wishes = replace(wishes, trims=trims, equal=equal)
    group = AUTO_SCOPE if scope == "auto" else check_scope(scope)
    combinations = _combinations(precisions(anatomy, precision), wishes.rate)
    options = [
        count_option(anatomy, budget, tokens, group, name, share_cut, wishes)
        for name, share_cut in combinations
    ]
    chosen = _choose(options)
    if chosen is None:
        allowed = [option.candidate for option in options if option.allowed]
        raise does_not_fit(anatomy, budget, tokens, allowed)
    explained = tuple(explain(anatomy, budget, option, chosen, wishes) for option in options)
    candidate = explained[options.index(chosen)]
    placement = chosen.placement
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
        scratch_bytes=(4 if trims else 2) * calibration_tokens * anatomy.hidden_size * 4,
        prefer=prefer,
        dense_precision=dense_precision,
    )


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
    """The mildest allowed option that meets every wish, else the one that removes most, else
    nothing.
    """
    fitting = [option for option in options if option.allowed and option.placement.fits]
    for option in fitting:
        if option.meets:
            return option
    return fitting[-1] if fitting else None


def _checked_context(anatomy: ModelAnatomy, context: int | None) -> int:
    longest = anatomy.max_context
    if context is None:
        return min(DEFAULT_CONTEXT, longest)
    if context < 1:
        raise UsageError(
            f"--context {context} is no length.", "", f"--context {min(DEFAULT_CONTEXT, longest)}"
        )
    if context > longest:
        raise UsageError(
            f"--context {context} is longer than {anatomy.architecture} can read.",
            f"its longest context is {longest} tokens",
            f"--context {longest}",
        )
    return context


def _wishes(
    rate: float | Literal["auto"],
    precision: str,
    prefer: Preference,
    min_resident: float | None,
    speed_floor: float | None,
    budget: Budget,
) -> Wishes:
    """Check what was asked for and fill in the defaults; a speed floor stands in for the default
    residency.
    """
    if prefer not in _MIN_RESIDENT:
        raise UsageError(
            f"--prefer {prefer} is not known.", "", "--prefer quality, or --prefer speed"
        )
    if min_resident is not None and not 0.0 <= min_resident <= 1.0:
        raise UsageError(
            f"--min-resident {min_resident:g} is not a share.",
            "it lies between 0 and 1",
            "--min-resident 0.8",
        )
    if speed_floor is not None and speed_floor <= 0:
        raise UsageError("The speed floor must be more than 0 tokens/s.")
    if speed_floor is not None and not (
        budget.device_bandwidth and (budget.link_bandwidth or budget.disk_bandwidth)
    ):
        raise UsageError(
            "A speed floor cannot be judged for this budget.",
            "the bandwidths of the target are not known",
            "Name a profile that has them, such as --gpu rtx-4090 or --gpu cpu-16gb",
        )
    if min_resident is None:
        min_resident = _MIN_RESIDENT[prefer] if speed_floor is None else 0.0
    return Wishes(
        None if rate == "auto" else check_rate(rate),
        None if precision == "auto" else precision,
        min_resident,
        speed_floor,
    )
