"""What ``inspect`` prints: a package on 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conmoe_edge.cli.ui.text import counted, path_text, percent, percent_whole, printable, span
from conmoe_edge.cli.views.inspect_map import slot_map
from conmoe_edge.cli.views.plan_views import precision_name, receipt_view, table_view, tier_name
from conmoe_edge.report.package_summary import PackageSummary
from conmoe_edge.report.reduction import and_list, reduction_words
from conmoe_edge.report.slot_shares import PrototypeFact, quantile
from conmoe_edge.units import human_size

_SHOWN = 5
_NONE = "–"


def inspect_view(facts: PackageSummary, width: int) -> RenderableType:
    """Everything that a terminal has room for."""
    parts: list[RenderableType] = [
        _head("Package", package_line(facts)),
        _head("Method", method_line(facts)),
        *(_head("Experts" if not n else "", line) for n, line in enumerate(experts_lines(facts))),
        _head("Files", files_line(facts)),
    ]
    if facts.manifest.cache:
        parts.append(_head("Cache", cache_line(facts)))
    parts += [_head("Note", printable(note)) for note in facts.manifest.notes]
    if facts.plan is not None:
        parts += [Text(), _against_plan(facts)]
    receipt = receipt_view(facts.manifest.receipt)
    if receipt is not None:
        parts += [Text(), receipt]
    if facts.unchanged:
        parts += [Text(), Text("  Every expert is as it was; there is nothing to show of them.")]
    elif facts.slots:
        parts += [Text(), Text(f"  {slots_line(facts)}", style="bold"), slot_map(facts, width)]
        parts += _prototypes(facts)
    return Group(*parts)


def package_line(facts: PackageSummary) -> str:
    """``./out · demo (olmoe) · 6 MoE layers of 32 router slots · top-4``."""
    kind = f" ({facts.model_type})" if facts.model_type else ""
    parts = [path_text(facts.folder), printable(facts.name + kind)]
    if facts.slots:
        slots = span(len(row) for row in facts.slots.values())
        parts.append(f"{counted(len(facts.slots), 'MoE layer')} of {slots} router slots")
    if facts.top_k is not None:
        parts.append(f"top-{facts.top_k}")
    return " · ".join(parts)


def method_line(facts: PackageSummary) -> str:
    """``auto · experts in q2, q3 and q4 · all else in int8 · by conmoe-edge 0.1.0``."""
    manifest = facts.manifest
    parts = [printable(manifest.method)]
    if manifest.scope > 1:
        parts.append(f"shared by {manifest.scope} layers")
    forms = sorted({part for one in facts.layout_precisions for part in one.split("-")})
    if not facts.unchanged and forms:
        words = [precision_name(printable(form)) for form in forms]
        if words == ["source"]:
            words = sorted({one.form for one in facts.prototypes})
        parts.append(f"experts in {and_list(words)}")
    if manifest.dense_precision != "source":
        parts.append(f"all else in {manifest.dense_precision}")
    if manifest.kv_precision != "source":
        parts.append(f"keys and values in {manifest.kv_precision}")
    if manifest.tool_version:
        parts.append(f"by conmoe-edge {printable(manifest.tool_version)}")
    return " · ".join(parts)


def experts_lines(facts: PackageSummary) -> list[str]:
    """``150 of 192 experts are left, all of them with fewer neurons`` and what that is in bytes; empty where the model
    is as it was.
    """
    if facts.unchanged:
        return []
    lines = reduction_words(facts.reduction)
    if (
        facts.reduction.bytes_before is None and lines
    ):  # a package from before that was written down
        lines.append(_removed(facts))
    return lines


def _removed(facts: PackageSummary) -> str:
    """What the plan took: experts, or bits and neurons of all of them."""
    manifest = facts.manifest
    chosen = manifest.plan.get("chosen") if manifest.plan else None
    bits = chosen.get("bits") if isinstance(chosen, dict) else None
    if isinstance(bits, float) and bits > 0:
        return f"{bits:.2f} bits a weight of the original's experts"
    if not manifest.rate:
        return "nothing removed"
    # Beside narrower experts there are more of them, so the share is one of weights.
    expected = (1 - manifest.rate) * len(facts.every_slot)
    trimmed = len(manifest.prototypes) > expected + len(manifest.slots)
    return f"{percent(manifest.rate)} fewer {'expert weights' if trimmed else 'experts'}"


def files_line(facts: PackageSummary) -> str:
    """How large it is, and how far that was checked."""
    sizes = facts.sizes
    total = human_size(sizes.dense + sizes.prototypes + sizes.other)
    count = counted(len(facts.manifest.files), "file")
    if facts.verified:
        return f"{total} · {count} hashed, all as the manifest says"
    return f"{total} · {count}, all there in full; --verify hashes them"


def cache_line(facts: PackageSummary) -> str:
    """The settings that the replay chose for the planned slots."""
    parts = []
    for layout, one in zip(facts.manifest.layouts, facts.manifest.cache, strict=True):
        hit = "" if one.predicted_hit is None else f", {percent(one.predicted_hit)} hits in replay"
        of = f" for {layout.precision} records" if len(facts.manifest.cache) > 1 else ""
        parts.append(f"{one.slots:,} slots{of}: {printable(one.policy)}{hit}")
    return " · ".join(parts)


def slots_line(facts: PackageSummary) -> str:
    """``Router slots: 96 keep their expert, 96 share another's``."""
    counts = facts.counts()
    added = sum(slot.constant and slot.prototype is not None for slot in facts.every_slot)
    words = (
        (counts["prototype"], "keeps its expert", "keep their expert"),
        (counts["alias"], "shares another's", "share another's"),
        (counts["constant"], "became a constant", "became constants"),
        (counts["dropped"], "was dropped", "were dropped"),
        (added, "adds a constant", "add a constant"),
    )
    said = [f"{count:,} {one if count == 1 else more}" for count, one, more in words if count]
    return f"Router slots: {', '.join(said)}"


def _head(label: str, value: str) -> Text:
    return Text.assemble((f"{label:<9}", "bold"), value)


def _against_plan(facts: PackageSummary) -> RenderableType:
    plan, sizes, measured = facts.plan, facts.sizes, facts.measured
    assert plan is not None
    weights = sizes.dense + sizes.prototypes
    used = None if measured is None else human_size(measured.memory.used_bytes)
    speed = plan.chosen.tokens_per_second
    spoken = None if measured is None else f"{measured.decode.tokens_per_second.median:.1f} tok/s"
    budget = human_size(plan.budget.device_bytes)
    tier = tier_name(plan.budget)
    rows = []
    if facts.prototypes:
        made = len(facts.prototypes)
        if len({one.nbytes for one in facts.prototypes}) == 1 and not plan.chosen.bits:
            rows.append(("experts left", f"{plan.chosen.prototypes:,}", f"{made:,}", ""))
        else:  # a plan gives bytes then, and the fit finds how many experts stay in them
            found = human_size(facts.reduction.bytes_now)
            rows.append(("experts", human_size(plan.chosen.pool_bytes), found, ""))
    rows += [
        ("weights on disk", human_size(plan.disk_bytes), human_size(weights), ""),
        ("memory", human_size(plan.device_bytes_used), used, f"of {budget} {tier}"),
        ("experts in memory", percent_whole(plan.chosen.resident_share), _resident(facts), ""),
        ("speed", _NONE if speed is None else f"~{speed:.0f} tok/s", spoken, ""),
    ]
    table = table_view(
        ("  Plan", "planned", "found", ""),
        [(f"  {name}", said, seen or _NONE, note) for name, said, seen, note in rows],
        numbers=frozenset({1, 2}),
    )
    if measured is not None:
        return table
    hint = f"  {_NONE} after a run: `bench DIR --json > FILE`, then `inspect DIR --bench FILE`"
    return Group(table, Text(hint, style="dim"))


def _resident(facts: PackageSummary) -> str | None:
    if facts.measured is None or not facts.prototypes:
        return None
    return percent_whole(min(1.0, facts.measured.package.slots / len(facts.prototypes)))


def _prototypes(facts: PackageSummary) -> list[RenderableType]:
    if not facts.prototypes:
        return []
    shown = min(_SHOWN, len(facts.prototypes) // 2)
    parts: list[RenderableType] = []
    if shown and any(one.weight for one in facts.prototypes):
        busiest = facts.busiest(shown)
        for title, chosen in (("Busiest", busiest), ("Loneliest", facts.loneliest(shown))):
            parts += [Text(), _table(title, chosen, len(facts.prototypes))]
        layer, expert = busiest[0].id
        parts.append(Text(f"  {layer}.{expert} was expert {expert} of layer {layer}.", style="dim"))
    distances = facts.distances
    if distances:
        figures = (
            f"{distances[0]:.3f} least, {quantile(distances, 0.5):.3f} median, "
            f"{quantile(distances, 0.9):.3f} ninth decile, {distances[-1]:.3f} most"
        )
        if len(distances) == 1:
            figures = f"{distances[0]:.3f}"
        word = "Distance" if len(distances) == 1 else "Distances"
        note = "  From a slot's pretrained expert to its prototype: 0 the same, 1.414 unrelated."
        parts += [Text(), Text(f"  {word}: {figures}"), Text(note, style="dim")]
    return parts


def _table(title: str, prototypes: tuple[PrototypeFact, ...], count: int) -> Table:
    return table_view(
        (f"  {title}", "slots", "of layers", "weight", "of an equal share", "record"),
        [
            (
                f"  {one.id.layer}.{one.id.expert}",
                f"{one.slots:,}",
                span(one.layers),
                f"{100 * one.weight:.2f} %",
                f"×{one.weight * count:.2f}",
                f"{one.short_form}, {human_size(one.nbytes)}",
            )
            for one in prototypes
        ],
        numbers=frozenset({1, 3, 4}),
    )
