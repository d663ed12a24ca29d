"""Plans, receipts, profiles and findings as things that rich can print. Reads dataclasses, decides
and prints nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conmoe_edge.cli.ui.text import counted, path_text, percent, percent_whole, printable, span
from conmoe_edge.cli.views.match_lines import match_lines
from conmoe_edge.compress.stats.match_counts import matches_in
from conmoe_edge.plan.advice import cost, measured
from conmoe_edge.plan.priors import demo_divergence
from conmoe_edge.plan.record_options import bits_of_bytes
from conmoe_edge.units import human_size, unit_for

if TYPE_CHECKING:
    from conmoe_edge.api import PlanReport
    from conmoe_edge.api.finding import Finding
    from conmoe_edge.memory.budget import Budget
    from conmoe_edge.model.anatomy import ModelAnatomy
    from conmoe_edge.plan.plan import Candidate, Plan
    from conmoe_edge.plan.prompt_speed import PromptSpeed

_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Rows of the candidates' table around the chosen one; --json has them all.
_MILDER_SHOWN, _HARDER_SHOWN = 6, 2
_SHARE_FIRST = re.compile(r"^[0-9.]+ % resident: ")


def plan_view(report: PlanReport, out: Path, free: int | None) -> RenderableType:
    """The whole plan: model, budget, needs, candidates, disk. ``free`` is the free disk at ``out``,
    if known.
    """
    plan = report.plan
    parts: list[RenderableType] = [
        _head("Model", printable(report.source_name), model_line(report.anatomy)),
        _head("Budget", *budget_line(plan.budget)),
        Text(),
        _needs(plan),
        Text(),
    ]
    parts += [_unchanged(plan) if plan.unchanged else _candidates(report), Text()]
    if report.prompt is not None:
        parts.append(_head("Prompts", *prompt_line(report.prompt, plan.prefill_chunk)))
    if plan.chosen.rate or plan.chosen.bits:
        parts.append(_head("Method", report.method, printable(report.method_note)))
    if report.scopes_tried:
        tried = " or ".join(str(scope) for scope in report.scopes_tried)
        parts.append(
            _head("Scope", f"{tried}", "layers share prototypes: fit measures which loses less")
        )
    if report.tokenizer is False:
        parts.append(
            _head(
                "Tokens",
                "the model has no tokenizer that can be used",
                f"{printable(report.tokenizer_fault)}, so fit and chat refuse it; "
                f"fix: {printable(report.tokenizer_fix)}",
            )
        )
    parts += _beside(report)
    if report.export_note:
        parts.append(_head("Export", printable(report.export_note)))
    if report.advice:
        parts.append(_head("Advise", printable(report.advice)))
    parts += [*_memory(report), _disk(report, out, free), *_fetch(report)]
    return Group(*parts)


def prompt_line(prompt: PromptSpeed, chunk: int) -> tuple[str, str]:
    """``512 tokens in about 3.4 s (151 tok/s)`` and how many go through at a time."""
    seconds = f"{prompt.seconds:.2g}" if prompt.seconds < 10 else f"{prompt.seconds:,.0f}"
    rate = prompt.tokens_per_second
    speed = f"{rate:,.0f} tok/s" if rate >= 100 else f"{rate:.3g} tok/s"
    text = f"{counted(prompt.tokens, 'token')} in about {seconds} s ({speed})"
    return text, f"up to {chunk:,} tokens at a time"


def _beside(report: PlanReport) -> list[Text]:
    """What becomes of the model's parts for pictures and sound."""
    if not report.beside.tensors:
        return []
    if report.keeps_vision:
        return [_head("Vision", f"kept: {report.beside}", "chat and serve answer text")]
    if report.plan.unchanged:
        return [_head("Vision", f"linked: {report.beside}", "chat and serve answer text")]
    return [
        _head(
            "Vision",
            f"left out: {report.beside}",
            "the package answers text; --keep-vision takes them along",
        )
    ]


def model_line(anatomy: ModelAnatomy) -> str:
    """``16 MoE layers · 64 experts · top-8 · bf16 · 12.89 GiB``."""
    moe = anatomy.moe_layers
    experts = [layer.experts for layer in moe if layer.experts is not None]
    matrices = [part for one in experts for part in one.parts if len(part.shape) == 2]
    forms = {part.form for part in matrices} - {"plain"}
    formats = dict.fromkeys((precision_name(anatomy.dtype), *sorted(forms)))
    return " · ".join(
        (
            counted(len(moe), "MoE layer"),
            f"{span(e.count for e in experts)} experts",
            f"top-{span(e.top_k for e in experts)}",
            " and ".join(formats),
            human_size(anatomy.total_bytes),
        )
    )


def precision_name(name: str) -> str:
    """The short name of a dtype: ``bf16`` for ``bfloat16``; others as they are."""
    return _PRECISION.get(name, name)


def budget_line(budget: Budget) -> tuple[str, str]:
    """The budget in the user's own words and in binary units, and where it comes from."""
    source, exact = printable(budget.source), human_size(budget.device_bytes)
    if budget.here:
        source += f"; {printable(budget.here)}"
    if exact in source:
        return source, ""
    return f"{printable(budget.asked)} = {exact}", source


def tier_name(budget: Budget) -> str:
    """What a user calls the device tier."""
    return "GPU" if budget.device == "cuda" else "RAM"


def _head(label: str, value: str, note: str = "") -> Text:
    return Text.assemble((f"{label:<9}", "bold"), value, (f"   {note}" if note else "", "dim"))


def _needs(plan: Plan) -> Table:
    """The sum, one named term a line, and what is left for the prototypes."""
    # One unit for the whole sum.
    unit = unit_for(plan.budget.device_bytes)
    table = _grid()
    table.add_column(min_width=36)
    table.add_column(justify="right", min_width=8)
    table.add_column(style="dim", overflow="fold")
    where = "on the GPU" if plan.budget.device == "cuda" else "in RAM"
    table.add_row(Text(f"  Needed {where}", style="bold"), Text(unit.name, style="bold"), "")
    for term in plan.terms:
        table.add_row(Text(f"  {term.name}"), unit.text(term.nbytes), Text(term.note))
    used = plan.chosen.resident_bytes
    table.add_row(
        Text("  Left for prototypes"),
        unit.text(plan.left_for_prototypes),
        Text(f"of which {unit.text(used)} {unit.name} are used"),
    )
    return table


def _unchanged(plan: Plan) -> Text:
    used = human_size(plan.device_bytes_used)
    total = human_size(plan.budget.device_bytes)
    return Text.assemble(
        ("Fits unchanged: ", "bold green"),
        f"{used} of {total}. Every expert is kept; consolidation is optional, "
        "--rate 25% does it anyway.",
    )


def shown_candidates(plan: Plan) -> tuple[list[Candidate], int]:
    """The rows worth reading: the mildest ones before the chosen one, that one, two after it; and
    how many are left out.
    """
    rows = list(plan.candidates)
    where = rows.index(plan.chosen)
    before, after = rows[:where], rows[where + 1 :]
    if len(before) > _MILDER_SHOWN:
        # The mildest are what a user would like, the last ones before the choice show how close it
        # was.
        before = before[: _MILDER_SHOWN // 2] + before[-(_MILDER_SHOWN // 2) :]
    kept = [*before, plan.chosen, *after[:_HARDER_SHOWN]]
    return kept, len(rows) - len(kept)


def _candidates(report: PlanReport) -> RenderableType:
    plan = report.plan
    rows, hidden = shown_candidates(plan)
    speeds = any(c.tokens_per_second is not None for c in rows)
    precisions = len({c.precision for c in plan.candidates}) > 1
    table = _grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    headers = ["rate", "scope", *(["precision"] if precisions else []), "prototypes", "size"]
    headers.insert(-2, "bits")
    headers += ["resident", *(["tok/s"] if speeds else [])]
    for header in headers:
        table.add_column(justify="left" if header == "precision" else "right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", *(Text(h, style="bold") for h in headers), Text("verdict", style="bold"))
    for candidate in rows:
        chosen = candidate == plan.chosen
        rate = "–" if candidate.bits else percent(candidate.rate)
        cells = [rate, str(candidate.scope) if candidate.rate else "–"]
        cells += [precision_name(candidate.precision)] if precisions else []
        bits = candidate.bits or bits_of_bytes(report.anatomy, candidate.pool_bytes)
        cells.append(f"{bits:.2f}")
        cells += [f"{candidate.prototypes:,}", human_size(candidate.pool_bytes)]
        cells.append(percent_whole(candidate.resident_share))
        if speeds:
            speed = candidate.tokens_per_second
            cells.append(
                "?" if speed is None else f"~{speed:.1f}" if speed < 10 else f"~{speed:.0f}"
            )
        style = "bold" if chosen else "dim" if candidate.verdict == "too big" else ""
        table.add_row(
            "❯" if chosen else "",
            *(Text(c) for c in cells),
            Text(_verdict(candidate, report)),
            style=style,
        )
    if not hidden:
        return table
    return Group(table, Text(f"  {hidden} more in --json", style="dim"))


def _verdict(candidate: Candidate, report: PlanReport) -> str:
    # The reason stands alone in the manifest; beside the column of shares it is shorter.
    reason = _SHARE_FIRST.sub("", candidate.reason)
    text = f"{candidate.verdict}: {reason}" if reason else candidate.verdict
    known = measured(candidate, report.plan, report.outcomes, report.method)
    if known is not None:
        return f"{text}; measured: {cost(known)}"
    prior = demo_divergence(candidate.bits) if candidate.bits else None
    return text if prior is None else f"{text}; measured on the demo model: KL {prior:.3f}"


def _memory(report: PlanReport) -> list[Text]:
    if report.memory is None:
        return []
    text = f"the fit itself needs about {human_size(report.memory.nbytes)} of RAM"
    return [_head("Memory", text, "--calibration-tokens lowers it")]


def _disk(report: PlanReport, out: Path, free: int | None) -> Text:
    plan, fetching = report.plan, report.fetching
    scratch = plan.scratch_bytes if fetching is None else fetching.scratch_bytes
    text = f"needs {human_size(plan.disk_bytes)} in {path_text(out)}"
    notes = [] if free is None else [f"{human_size(free)} free"]
    if scratch:
        notes.append(f"{human_size(scratch)} more while it works")
    return _head("Disk", text, ", ".join(notes))


def _fetch(report: PlanReport) -> list[Text]:
    fetching = report.fetching
    if fetching is None:
        return []
    text = f"{human_size(fetching.nbytes)} from the hub"
    if fetching.cache_bytes:
        return [_head("Fetch", text, "kept whole in the hub's cache")]
    return [_head("Fetch", text, "layer by layer; --keep-source keeps the model on this disk")]


def receipt_view(receipt: Mapping[str, Any]) -> RenderableType | None:
    """The quality receipt: what consolidation cost, in all and by domain; ``None`` where there is
    none.
    """
    if not receipt:
        return None
    table = _grid(padding=(0, 2, 0, 0))
    for _ in range(7):
        table.add_column(justify="right", no_wrap=True)
    table.columns[0].justify = "left"
    header = ("  Quality", "tokens", "loss before", "after", "perplexity", "KL", "same top-1")
    table.add_row(*(Text(cell, style="bold") for cell in header))
    table.add_row(*_receipt_row("all", receipt), style="bold")
    domains = receipt.get("per_domain") or {}
    for name in sorted(domains):
        table.add_row(*_receipt_row(name, domains[name]))
    note = "  On text that calibration did not see. Loss: nats a token; KL: to the original."
    exact = [Text(f"  {line}") for line in match_lines(matches_in(receipt), "original")]
    return Group(table, *exact, Text(note, style="dim"))


def _receipt_row(name: str, row: Mapping[str, Any]) -> list[Text]:
    def number(key: str, form: str) -> str:
        value = row.get(key)
        return "" if value is None else format(value, form)

    ratio = row.get("perplexity_ratio")
    agreement = row.get("top1_agreement")
    cells = [
        f"  {printable(name)}",
        number("tokens", ",d"),
        number("loss_original", ".3f"),
        number("loss_consolidated", ".3f"),
        "" if ratio is None else f"×{ratio:.3f}",
        number("kl", ".4f"),
        "" if agreement is None else f"{100 * agreement:.1f} %",
    ]
    return [Text(cell) for cell in cells]


def table_view(
    headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[int] = frozenset()
) -> Table:
    """A plain table; ``numbers`` are the columns to align right."""
    table = _grid(padding=(0, 2, 0, 0))
    for index in range(len(headers)):
        side = "right" if index in numbers else "left"
        table.add_column(justify=side, overflow="fold", no_wrap=index != len(headers) - 1)
    if any(headers):
        table.add_row(*(Text(h, style="bold") for h in headers))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _grid(padding: tuple[int, int, int, int] = (0, 3, 0, 0)) -> Table:
    """A table without lines."""
    return Table.grid(padding=padding)


_STATUS_STYLE = {"ok": "green", "info": "cyan", "warn": "bold yellow", "fail": "bold red"}


def finding_view(finding: Finding) -> Table:
    """One finding of ``doctor``, with its fix on a line of its own."""
    table = _grid()
    table.add_column(width=4)
    table.add_column(width=13)
    table.add_column(overflow="fold")
    style = _STATUS_STYLE[finding.status]
    table.add_row(
        Text(finding.status, style=style),
        Text(finding.name, style="bold"),
        Text(printable(finding.text)),
    )
    if finding.fix:
        table.add_row("", "", Text(f"fix: {finding.fix}"))
    return table
