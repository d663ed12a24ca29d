"""The memory of the target, term by term: what the plan counted, and what is known to be so."""

from __future__ import annotations

from conmoe_edge.report.markup import Markup, figure, stretched, tag
from conmoe_edge.report.package_summary import MemoryTerm, PackageSummary, memory_terms
from conmoe_edge.units import human_size, unit_for

_FULL = 100.0


def memory_bars(facts: PackageSummary) -> Markup:
    """The whole section; nothing without a plan."""
    terms = memory_terms(facts)
    if facts.plan is None or not terms:
        return Markup("")
    budget = facts.plan.budget.device_bytes
    used = facts.plan.device_bytes_used
    where = "GPU" if facts.plan.budget.device != "cpu" else "RAM"
    parts = [_stack(terms, budget)]
    parts += [
        _row(number, term, max(t.planned for t in terms)) for number, term in enumerate(terms)
    ]
    lead = f"Planned: {human_size(used)} of {human_size(budget)} {where}."
    if facts.measured is not None:
        taken = facts.measured.memory
        lead += f" Measured by bench: {human_size(taken.used_bytes)} in use"
        lead += f", within {human_size(taken.budget_bytes)}."
        parts.insert(1, _measured(taken.used_bytes, budget))
    lead += " The second bar of a term is what lies on the disk for it."
    return figure("Where the memory goes", *parts, lead=lead, id_="memory")


def _stack(terms: tuple[MemoryTerm, ...], budget: int) -> Markup:
    total = max(budget, sum(term.planned for term in terms))
    left, shapes = 0.0, [tag("rect", x=0.0, y=0.0, width=_FULL, height=10.0, class_="rail")]
    for number, term in enumerate(terms):
        width = _FULL * term.planned / total
        label = f"{term.name}: {human_size(term.planned)}"
        box = tag("rect", x=left, y=0.0, width=width, height=10.0, class_=f"term t{number % 6}")
        shapes.append(tag("g", tag("title", label), box))
        left += width
    free = max(0, budget - sum(term.planned for term in terms))
    picture = stretched(*shapes, wide=_FULL, high=10.0, label="the whole budget", class_="stack")
    note = f"{human_size(free)} of the budget stay free" if free else "all of the budget is used"
    return tag("div", picture, tag("p", note, class_="after"), class_="whole")


def _measured(used: int, budget: int) -> Markup:
    shapes = [
        tag("rect", x=0.0, y=0.0, width=_FULL, height=10.0, class_="rail"),
        tag(
            "rect",
            x=0.0,
            y=0.0,
            width=min(_FULL, _FULL * used / budget),
            height=10.0,
            class_="found",
        ),
    ]
    picture = stretched(*shapes, wide=_FULL, high=10.0, label="measured", class_="stack thin")
    return tag(
        "div", picture, tag("p", f"{human_size(used)} measured", class_="after"), class_="whole"
    )


def _row(number: int, term: MemoryTerm, most: int) -> Markup:
    unit = unit_for(most)

    def bar(nbytes: int, top: float, class_: str) -> Markup:
        width = _FULL * nbytes / most if most else 0.0
        return tag("rect", x=0.0, y=top, width=width, height=4.0, class_=class_)

    bars = [bar(term.planned, 0.5 if term.found is not None else 3.0, f"term t{number % 6}")]
    if term.found is not None:
        bars.append(bar(term.found, 5.5, "found"))
    figures = [tag("b", f"{unit.text(term.planned)} {unit.name}")]
    if term.found is not None:
        figures.append(tag("span", f"{unit.text(term.found)} on disk", class_="soft"))
    return tag(
        "div",
        tag(
            "div", tag("span", term.name), tag("span", term.note, class_="soft note"), class_="what"
        ),
        tag("div", *figures, class_="figures"),
        stretched(*bars, wide=_FULL, high=10.0, label=f"{term.name}", class_="bar"),
        class_="bars",
    )
