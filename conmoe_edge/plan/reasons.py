"""What a plan says of each of its candidates: one word, and a sentence that a user reads."""

from __future__ import annotations

from dataclasses import replace

from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.candidate import Option
from conmoe_edge.plan.levers import PRECISIONS, keeps_weights, published_in
from conmoe_edge.plan.plan import Candidate, Plan
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.units import human_size

_KIND_WORDS = {
    "source": "as they are",
    "mxfp4": "in MXFP4 as published",
    "bf16": "in bf16",
    "int8": "at 8 bits",
    "int4": "at 4 bits",
    "q4": "in 4 bits",
    "q3": "in 3 bits",
    "q2": "in 2 bits",
    "lowrank": "as low rank and a few columns",
}


def explain(
    anatomy: ModelAnatomy, budget: Budget, option: Option, chosen: Option, request: PlanRequest
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
            candidate, verdict="chosen", reason=_why_chosen(anatomy, budget, option, request)
        )
    enough = candidate.resident_share >= request.least_resident - 1e-9
    if option.pointless and enough:
        wide, narrow = PRECISIONS[candidate.precision].kinds
        reason = f"leaves no room for a prototype {_KIND_WORDS[wide]}, so it is {narrow}"
        return replace(candidate, verdict="fits", reason=reason)
    if not option.meets:
        return replace(candidate, verdict="slow", reason=_shortcoming(budget, candidate))
    more_bits = candidate.bits > chosen.candidate.bits > 0
    if not option.allowed and more_bits:
        reason = f"more bits, but only {percent(candidate.resident_share)} resident"
    elif not option.allowed and not candidate.bits:
        reason = f"would do, but you asked for {percent(chosen.candidate.rate)}"
    elif candidate.rate > chosen.candidate.rate:
        reason = "would do, but removes more than is needed"
    else:
        reason = "would do, but with fewer bits than are needed"
    return replace(candidate, verdict="fits", reason=reason)


def is_unchanged(anatomy: ModelAnatomy, candidate: Candidate) -> bool:
    """Whether the model runs as it is: every expert kept, bit for bit, and resident."""
    whole = candidate.rate == 0.0 and candidate.slots == candidate.prototypes
    kept = anatomy.dense_precision == "source" and keeps_weights(anatomy, candidate.precision)
    # transformers would expand a quantised model in memory.
    return whole and kept and anatomy.source_form == "plain"


def keeps_every_weight(anatomy: ModelAnatomy, plan: Plan) -> bool:
    """Whether a package of this plan has all weights of the model, bit for bit, however it stores them."""
    own = plan.chosen.rate == 0.0 and plan.dense_precision == "source"
    return own and keeps_weights(anatomy, plan.chosen.precision)


def percent(share: float) -> str:
    """``37.5 %``, ``80 %``; a share below 1 is never rounded up to it."""
    value = min(share * 100, 99.9) if share < 1 else 100.0
    return f"{value:.1f} %" if value > 99 and share < 1 else f"{value:.3g} %"


def stored_words(candidate: Candidate) -> str:
    """How the prototypes are stored, for a sentence: ``at 8 bits``."""
    if candidate.bits:
        return f"in {candidate.bits:.3g} bits a weight"
    kinds = PRECISIONS[candidate.precision].kinds
    few, all_of_them = candidate.wide_prototypes, candidate.prototypes
    if len(kinds) == 1 or few in (0, all_of_them):
        return _KIND_WORDS[kinds[0] if few else kinds[-1]]
    others = _KIND_WORDS[kinds[1]]
    return (
        f"with {few:,} of {all_of_them:,} prototypes {_KIND_WORDS[kinds[0]]}, the others {others}"
    )


def _why_chosen(anatomy: ModelAnatomy, budget: Budget, option: Option, request: PlanRequest) -> str:
    candidate = option.candidate
    if candidate.bits:
        return _why_free(budget, option, request)
    if request.forced_rate:
        asked = f"you asked for {percent(candidate.rate)}"
        return asked if option.meets else f"{asked}; {_shortcoming(budget, candidate)}"
    if is_unchanged(anatomy, candidate):
        terms = sum(term.nbytes for term in option.placement.terms)
        used = human_size(terms + candidate.resident_bytes)
        return f"fits unchanged: {used} of {human_size(budget.device_bytes)}, nothing is removed"
    if option.meets and candidate.rate == 0.0 and candidate.slots == candidate.prototypes:
        own = candidate.precision == "int4" and published_in(anatomy) == "int4"
        words = "in int4 as published" if own else stored_words(candidate)
        return f"fits {words}, nothing is removed"
    if option.meets:
        share = request.least_resident
        wish = f"at least {percent(share)} resident" if share < 1 else "every prototype resident"
        return f"the mildest with {wish}"
    if request.forced_rate is not None:
        return f"you asked for {percent(candidate.rate)}; {_shortcoming(budget, candidate)}"
    return f"the most that is removed unasked; {_shortcoming(budget, candidate)}"


def _why_free(budget: Budget, option: Option, request: PlanRequest) -> str:
    """Of a candidate whose bytes are spent where they are worth most."""
    candidate = option.candidate
    if request.bits is not None:
        asked = f"you asked for {request.bits:g} bits"
        return asked if option.meets else f"{asked}; {_shortcoming(budget, candidate)}"
    if option.meets:
        return f"{candidate.bits:.2f} bits a weight leave every prototype resident"
    return f"the fewest bits that there are; {_shortcoming(budget, candidate)}"


def _shortcoming(budget: Budget, candidate: Candidate) -> str:
    """Why a candidate that fits is called slow."""
    share = candidate.resident_share
    origin = "from the disk" if budget.above_disk else "over PCIe"
    rest = "most experts come" if share < 0.5 else "the rest comes"
    return f"{percent(share)} resident: {rest} {origin}"
