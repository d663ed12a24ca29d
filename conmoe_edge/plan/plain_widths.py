"""The plan of a package that becomes a plain, smaller checkpoint: every expert kept, all with the same fewer neurons.

Engines that read plain checkpoints want one number of experts and one width for the whole model, and an expert for
every router slot. So the width is the only lever: the largest one, in steps of 32 neurons, whose experts are all
resident beside everything else. ``--rate`` names it otherwise, as the share of the neurons that goes. Numbers are the
model's own.

With ``--quantise`` it is the GGUF file of that type that has to be resident, and the steps are whole blocks of the type
(256 neurons for K-quants), as long as there is one. The package itself is in the model's own numbers all the same, and
so are the candidates' bytes. Arithmetic only.
"""

from __future__ import annotations

from dataclasses import replace

from conmoe_edge.errors import DoesNotFit, UnsupportedModel
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.anatomy import ModelAnatomy
from conmoe_edge.plan.gguf_sizes import SMALLEST_BLOCK, gguf_sizes, step_of
from conmoe_edge.plan.least import least_bytes, least_size
from conmoe_edge.plan.levers import record_bytes
from conmoe_edge.plan.needs import needs_of
from conmoe_edge.plan.placement import Placement, place
from conmoe_edge.plan.plan import Candidate, Term
from conmoe_edge.plan.request import PlanRequest
from conmoe_edge.plan.width_levers import narrowed
from conmoe_edge.units import human_size


def choose_width(
    anatomy: ModelAnatomy, budget: Budget, context: int, request: PlanRequest
) -> tuple[Candidate, tuple[Candidate, ...], Placement]:
    """Decide.

    Returns:
        The width that is taken, every width that was looked at, and how the memory is divided with the first.

    Raises:
        UnsupportedModel: layers whose experts have different widths, which one number cannot say.
        DoesNotFit: not even the narrowest experts fit.
    """
    widths = {layer.experts.width for layer in anatomy.moe_layers if layer.experts}
    if len(widths) != 1:
        raise UnsupportedModel(
            f"The experts of {anatomy.architecture} have different widths.",
            f"layers have {', '.join(map(str, sorted(widths)))} neurons; a plain checkpoint has one number for all",
            "leave out --for",
        )
    whole = widths.pop()
    every, rate = _steps(whole, request.quantise), request.forced_rate
    options = [_counted(anatomy, budget, context, request, one, whole) for one in every]
    allowed = options
    if rate is not None:
        nearest = min(every, key=lambda one: (abs(one - (1.0 - rate) * whole), -one))
        allowed = [one for one in options if one[0].width == nearest]
    fitting = [one for one in allowed if one[0].verdict == "fits"]
    if not fitting:
        raise _does_not_fit(anatomy, budget, context, request, allowed[-1][0].width, whole)
    chosen, placement = fitting[0]
    shown = tuple(
        replace(chosen, verdict="chosen", reason=_why(chosen, whole, request.quantise))
        if one is chosen
        else one
        for one, _ in options
    )
    candidate = next(one for one in shown if one.verdict == "chosen")
    return candidate, shown, placement


def _does_not_fit(
    anatomy: ModelAnatomy,
    budget: Budget,
    context: int,
    request: PlanRequest,
    width: int,
    whole: int,
) -> DoesNotFit:
    """The error where not even experts of ``width`` neurons fit, with the least budget that holds them."""

    def fits(nbytes: int) -> bool:
        given = replace(budget, device_bytes=nbytes)
        return _counted(anatomy, given, context, request, width, whole)[0].verdict == "fits"

    high = least_bytes(fits, budget.device_bytes)
    return DoesNotFit(
        f"{anatomy.architecture} does not fit in {budget.asked} with every expert kept.",
        f"with {width} of {whole} neurons in each it needs {human_size(high)}",
        f"--gpu {least_size(high)} is the least that works; leaving out --for allows fewer experts",
    )


def _steps(whole: int, kind: str | None) -> list[int]:
    """Widths, the whole one first."""
    step = SMALLEST_BLOCK if kind is None else step_of(kind, whole)
    coarse = range((whole - 1) // step * step, 0, -step)
    fine = range(step - SMALLEST_BLOCK, 0, -SMALLEST_BLOCK)
    return [whole, *coarse, *(fine if step > SMALLEST_BLOCK else ())]


def _counted(
    anatomy: ModelAnatomy,
    budget: Budget,
    context: int,
    request: PlanRequest,
    width: int,
    whole: int,
) -> tuple[Candidate, Placement]:
    narrow = narrowed(anatomy, width)
    experts = [layer.experts for layer in narrow.moe_layers if layer.experts]
    sizes = [record_bytes(one, "source") for one in experts]
    prototypes = sum(one.count for one in experts)
    pool = sum(one.count * size for one, size in zip(experts, sizes, strict=True))
    needs, held, resident, note = needs_of(narrow, budget.device, context), max(sizes), pool, ""
    if request.quantise is not None:
        file = gguf_sizes(narrow, request.quantise)
        needs = replace(
            needs, dense=Term("Dense weights", file.dense, f"in a file of {request.quantise}")
        )
        held, resident = max(file.experts), file.file - file.dense
        note = f", about {human_size(file.file)} as {request.quantise}"
    placement = place(
        needs,
        budget.device_bytes,
        prototypes=prototypes,
        record_bytes=held,
        pool_bytes=resident,
        wanted_share=1.0,
    )
    slots = placement.slots if placement.fits else 0
    fits = slots == prototypes
    return (
        Candidate(
            precision="source",
            rate=1.0 - width / whole,
            scope=1,
            prototypes=prototypes,
            record_bytes=max(sizes),
            pool_bytes=pool,
            slots=slots,
            resident_share=slots / prototypes,
            tokens_per_second=None,
            verdict="fits" if fits else "too big",
            reason=f"{width} of {whole} neurons in every expert{note}"
            + ("" if fits else "; not all experts fit"),
            width=width,
        ),
        placement,
    )


def _why(chosen: Candidate, whole: int, kind: str | None) -> str:
    size = "" if kind is None else chosen.reason.partition("every expert")[2]
    if chosen.width == whole:
        return f"fits unchanged, nothing is removed{size}"
    return f"every expert kept, with {chosen.width} of {whole} neurons each{size}"
