"""From a model and a budget to a plan: the least lossy levers that meet the budget.

1. A model that fits as it is stays as it is: rate 0, every expert resident.
2. Otherwise the mildest combination whose resident share reaches ``min_resident`` (0.8 to prefer
   quality, 1.0 to prefer speed) and whose estimated speed reaches ``speed_floor``, if given.
3. Where nothing up to a rate of 50 % reaches that, 50 % is taken and the rest stays offloaded:
   too little memory then costs speed. More than half is removed only by an explicit rate.

Forced levers are obeyed, also when they make the model slow. A larger budget never gives a higher
rate or, at the same rate, fewer slots.
Raises ``DoesNotFit`` with the least budget that works (and a shorter context that does),
``UsageError`` for nonsense, ``UnsupportedModel`` for a model without routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from conmoe_edge.errors import UnsupportedModel, UsageError
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.least import does_not_fit
from conmoe_edge.plan.levers import (
    AUTO_RATE_LIMIT,
    AUTO_SCOPE,
    RATE_GRID,
    check_rate,
    check_scope,
    keeps_weights,
    kept,
    precisions,
    record_bytes,
    scopes,
)
from conmoe_edge.plan.placement import Placement, place
from conmoe_edge.plan.plan import Candidate, Plan, Preference
from conmoe_edge.plan.speed import tokens_per_second
from conmoe_edge.units import human_size

DEFAULT_CONTEXT = 4096
DEFAULT_CALIBRATION_TOKENS = 64 * 512
_MIN_RESIDENT: dict[Preference, float] = {"quality": 0.8, "speed": 1.0}


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What decides between combinations."""

    rate: float | None
    min_resident: float
    speed_floor: float | None


@dataclass(frozen=True, slots=True)
class _Option:
    """A candidate with its division of the memory; ``meets`` says whether every wish is
    fulfilled.
    """

    candidate: Candidate
    placement: Placement
    allowed: bool
    meets: bool


def make_plan(
    anatomy: ModelAnatomy,
    budget: Budget,
    *,
    context: int | None = None,
    rate: float | Literal["auto"] = "auto",
    scope: int | Literal["auto"] = "auto",
    precision: str = "auto",
    prefer: Preference = "quality",
    min_resident: float | None = None,
    speed_floor: float | None = None,
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS,
) -> Plan:
    """Decide. ``context`` is 4096 tokens, or the model's longest where that is shorter, when
    ``None``.
    """
    if not anatomy.moe_layers:
        raise UnsupportedModel(
            f"{anatomy.architecture} has no routed experts.",
            "there is nothing to consolidate in a dense model",
            "Choose a Mixture-of-Experts model",
        )
    tokens = _checked_context(anatomy, context)
    wishes = _wishes(rate, prefer, min_resident, speed_floor, budget)
    group = AUTO_SCOPE if scope == "auto" else check_scope(scope)
    combinations = _combinations(precisions(anatomy, precision), wishes.rate)
    options = [
        _option(anatomy, budget, tokens, group, name, share_cut, wishes)
        for name, share_cut in combinations
    ]
    chosen = _choose(options)
    if chosen is None:
        allowed = [option.candidate for option in options if option.allowed]
        raise does_not_fit(anatomy, budget, tokens, allowed)
    explained = tuple(_explain(anatomy, budget, option, chosen, wishes) for option in options)
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
        unchanged=_is_unchanged(anatomy, candidate),
        disk_bytes=anatomy.dense_bytes + candidate.pool_bytes,
        scratch_bytes=2 * calibration_tokens * anatomy.hidden_size * 4,
        prefer=prefer,
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


def _option(
    anatomy: ModelAnatomy,
    budget: Budget,
    context: int,
    scope: int,
    precision: str,
    rate: float,
    wishes: _Wishes,
) -> _Option:
    """Count one combination."""
    experts = {
        layer.index: layer.experts for layer in anatomy.moe_layers if layer.experts is not None
    }
    prototypes = pool_bytes = 0
    for layers in scopes(anatomy, scope):
        count = kept(sum(experts[index].count for index in layers), rate)
        prototypes += count
        pool_bytes += count * record_bytes(experts[layers[0]], precision)
    record = max(record_bytes(one, precision) for one in experts.values())
    placement = place(
        anatomy,
        budget.device,
        budget.device_bytes,
        context=context,
        prototypes=prototypes,
        record_bytes=record,
        wanted_share=wishes.min_resident,
    )
    slots = placement.slots if placement.fits else 0
    share = slots / prototypes
    speed = None
    if placement.fits:
        offloaded = max(0, pool_bytes - slots * record)
        speed = tokens_per_second(
            anatomy, budget, precision=precision, resident_share=share, offloaded_bytes=offloaded
        )
    candidate = Candidate(
        precision=precision,
        rate=rate,
        scope=scope,
        prototypes=prototypes,
        record_bytes=record,
        pool_bytes=pool_bytes,
        slots=slots,
        resident_share=share,
        tokens_per_second=speed,
        verdict="",
        reason="",
    )
    meets = (
        placement.fits and share >= wishes.min_resident - 1e-9 and _fast_enough(candidate, wishes)
    )
    return _Option(candidate, placement, wishes.rate is None or rate == wishes.rate, meets)


def _choose(options: list[_Option]) -> _Option | None:
    """The mildest allowed option that meets every wish, else the one that removes most, else
    nothing.
    """
    fitting = [option for option in options if option.allowed and option.placement.fits]
    for option in fitting:
        if option.meets:
            return option
    return fitting[-1] if fitting else None


def _explain(
    anatomy: ModelAnatomy, budget: Budget, option: _Option, chosen: _Option, wishes: _Wishes
) -> Candidate:
    """Give a candidate its verdict and the sentence behind it."""
    candidate = option.candidate
    if not option.placement.fits:
        needs = human_size(option.placement.least_bytes)
        return replace(
            candidate, verdict="too big", reason=f"needs {needs} even with one slot per layer"
        )
    if option is chosen:
        return replace(
            candidate, verdict="chosen", reason=_why_chosen(anatomy, budget, option, wishes)
        )
    if not option.meets:
        return replace(candidate, verdict="slow", reason=_shortcoming(budget, candidate, wishes))
    reason = "would do, but removes more than is needed"
    if not option.allowed:
        reason = f"would do, but you asked for {_percent(chosen.candidate.rate)}"
    return replace(candidate, verdict="fits", reason=reason)


def _why_chosen(anatomy: ModelAnatomy, budget: Budget, option: _Option, wishes: _Wishes) -> str:
    candidate = option.candidate
    if wishes.rate is not None and wishes.rate > 0:
        asked = f"you asked for {_percent(candidate.rate)}"
        return asked if option.meets else f"{asked}; {_shortcoming(budget, candidate, wishes)}"
    if _is_unchanged(anatomy, candidate):
        terms = sum(term.nbytes for term in option.placement.terms)
        used = human_size(terms + candidate.slots * candidate.record_bytes)
        return f"fits unchanged: {used} of {human_size(budget.device_bytes)}, nothing is removed"
    if option.meets:
        share = wishes.min_resident
        wish = f"at least {_percent(share)} resident" if share < 1 else "every prototype resident"
        if wishes.speed_floor is not None:
            floor = f"{wishes.speed_floor:g} tokens/s within reach"
            wish = floor if wishes.min_resident == 0 else f"{wish} and {floor}"
        return f"the mildest with {wish}"
    if wishes.rate is not None:
        return (
            f"you asked for {_percent(candidate.rate)}; {_shortcoming(budget, candidate, wishes)}"
        )
    return f"the most that is removed unasked; {_shortcoming(budget, candidate, wishes)}"


def _shortcoming(budget: Budget, candidate: Candidate, wishes: _Wishes) -> str:
    """Why a candidate that fits is called slow."""
    share = candidate.resident_share
    if share < wishes.min_resident - 1e-9:
        origin = "from the disk" if budget.device == "cpu" else "over PCIe"
        rest = "most experts come" if share < 0.5 else "the rest comes"
        return f"{_percent(share)} resident: {rest} {origin}"
    return (
        f"about {candidate.tokens_per_second or 0:.1f} tokens/s by the bandwidths, "
        f"below the {wishes.speed_floor or 0:g} asked for"
    )


def _is_unchanged(anatomy: ModelAnatomy, candidate: Candidate) -> bool:
    whole = candidate.rate == 0.0 and candidate.slots == candidate.prototypes
    return whole and keeps_weights(anatomy, candidate.precision)


def _fast_enough(candidate: Candidate, wishes: _Wishes) -> bool:
    if wishes.speed_floor is None or candidate.tokens_per_second is None:
        return True
    return candidate.tokens_per_second >= wishes.speed_floor


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
    prefer: Preference,
    min_resident: float | None,
    speed_floor: float | None,
    budget: Budget,
) -> _Wishes:
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
    return _Wishes(None if rate == "auto" else check_rate(rate), min_resident, speed_floor)


def _percent(share: float) -> str:
    """``37.5 %``, ``80 %``; a share below 1 is never rounded up to it."""
    value = min(share * 100, 99.9) if share < 1 else 100.0
    return f"{value:.1f} %" if value > 99 and share < 1 else f"{value:.3g} %"
