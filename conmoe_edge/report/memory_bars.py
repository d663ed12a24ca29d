"""The memory of the target: the whole budget in one bar, and the model's own part term by term.

What the process takes without a model is the same for every model and often the most, so it stands in the first bar
alone: the terms of the second chart can be compared with each other.
"""

from __future__ import annotations

from conmoe_edge.report.charts import Axis, chart, framed, size_axis, ticks
from conmoe_edge.report.markup import Markup, figure, join, key, stretched, tag
from conmoe_edge.report.package_summary import MemoryTerm, PackageSummary, memory_terms
from conmoe_edge.units import human_size

_FULL = 100.0
_ROW = 10.0


def memory_bars(facts: PackageSummary) -> Markup:
    """The whole section; nothing without a plan."""
    terms = memory_terms(facts)
    if facts.plan is None or not terms:
        return Markup("")
    budget = facts.plan.budget.device_bytes
    used = facts.plan.device_bytes_used
    where = "GPU memory" if facts.plan.budget.device == "cuda" else "RAM"
    lead = f"Planned: {human_size(used)} of {human_size(budget)} of {where}."
    if facts.measured is not None:
        taken = facts.measured.memory
        lead += f" Measured by bench: {human_size(taken.used_bytes)} in use"
        lead += f", within {human_size(taken.budget_bytes)}."
    return figure(
        "Where the memory goes",
        _budget(facts, terms, where),
        _terms(tuple(term for term in terms if not term.process)),
        lead=lead,
        tip="Point at a bar, or tap it.",
        id_="memory",
    )


def _budget(facts: PackageSummary, terms: tuple[MemoryTerm, ...], where: str) -> Markup:
    """Process, model, what stays free; with a second bar where it was measured."""
    assert facts.plan is not None
    budget = facts.plan.budget.device_bytes
    process = sum(term.planned for term in terms if term.process)
    model = sum(term.planned for term in terms) - process
    measured = None if facts.measured is None else facts.measured.memory.used_bytes
    full = max(budget, process + model, measured or 0)
    rows = 1 if measured is None else 2
    parts = [
        ("process", "the process itself", process),
        ("t1", "the model", model),
        ("free", "free", max(0, budget - process - model)),
    ]
    shapes, left = [], 0.0
    for kind, name, nbytes in parts:
        width = _FULL * nbytes / full
        shapes.append(_bar(f"{name}: {human_size(nbytes)}", left, 1.0, width, 8.0, kind))
        left += width
    if measured is not None:
        said = f"measured: {human_size(measured)}"
        shapes.append(_bar(said, 0.0, _ROW + 1.0, _FULL * measured / full, 8.0, "found"))
    samples = [(_sample(kind), f"{name} {human_size(size)}") for kind, name, size in parts if size]
    if measured is not None:
        samples.append((_sample("found"), f"measured {human_size(measured)}"))
    high = _ROW * rows
    picture = stretched(*shapes, wide=_FULL, high=high, label="the whole budget", class_="budget")
    return join(
        chart(
            "The whole budget",
            tag("div", picture, style=f"height:{30 * rows}px"),
            across=size_axis(where, full),
            up=Axis("planned" if measured is None else "planned above, measured below"),
        ),
        key("", *samples),
    )


def _terms(terms: tuple[MemoryTerm, ...]) -> Markup:
    """A row a term, the largest as long as the picture."""
    most = max(1, *(max(term.planned, term.found or 0) for term in terms))
    found = any(term.found is not None for term in terms)
    axis = size_axis("memory", most)
    samples = [(_sample("t1"), "planned"), *([(_sample("found"), "on disk")] if found else [])]
    return framed(
        "The model's part of it",
        key("", *samples),
        tag("span", "what it is for", class_="upname"),
        *(_row(term, most) for term in terms),
        tag(
            "div",
            tag("div", ticks(axis), tag("span", axis.name, class_="acrossname"), class_="scale"),
            class_="bars foot",
        ),
    )


def _row(term: MemoryTerm, most: int) -> Markup:
    thin = term.found is not None
    said = f"{term.name}: {human_size(term.planned)}"
    width = _FULL * term.planned / most
    shapes = [_bar(said, 0.0, 1.0 if thin else 2.5, width, 4.0 if thin else 5.0, "t1")]
    figures = [tag("b", human_size(term.planned))]
    if term.found is not None:
        said = f"{term.name}: {human_size(term.found)} on disk"
        shapes.append(_bar(said, 0.0, 5.0, _FULL * term.found / most, 4.0, "found"))
        figures.append(tag("span", f"{human_size(term.found)} on disk", class_="soft"))
    return tag(
        "div",
        tag(
            "div", tag("span", term.name), tag("span", term.note, class_="soft note"), class_="what"
        ),
        tag("div", *figures, class_="figures"),
        stretched(*shapes, wide=_FULL, high=_ROW, label=term.name, class_="bar"),
        class_="bars",
    )


def _bar(said: str, left: float, top: float, width: float, height: float, class_: str) -> Markup:
    box = tag("rect", x=left, y=top, width=width, height=height, class_=class_)
    return tag("g", tag("title", said), box)


def _sample(class_: str) -> Markup:
    box = tag("rect", x=1.0, y=3.0, width=18.0, height=14.0, class_=class_)
    return tag("svg", box, class_="sample", viewBox="0 0 20 20", aria_hidden="true")
