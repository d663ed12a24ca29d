"""The report of ``bench`` as a table that fits 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conmoe_edge.api.bench_report import BenchReport, PhaseReport, Spread
from conmoe_edge.cli.ui.text import counted, path_text, percent, percent_whole
from conmoe_edge.cli.views.plan_views import precision_name, tier_name
from conmoe_edge.units import human_size, unit_for

_GB = 1e9
_LEGEND = (
    "Bytes and waiting are per token. Bound: bytes over the memory's bandwidth (of a prompt: "
    "operations over GFLOP/s, of bytes over GOP/s) plus what was missing over the disk's; "
    "overlapped: the longer of both."
)


def bench_view(report: BenchReport) -> RenderableType:
    """Package, machine, the figures of decode and prefill side by side, what they mean."""
    return Group(
        _head("Package", package_line(report)),
        _head("Machine", machine_line(report)),
        _head("Runtime", runtime_line(report)),
        *([_head("Tokens", report.facts.fast_path)] if report.facts.fast_path else []),
        Text(),
        _figures(report),
        Text(),
        *(Padding(Text(line, style=style), (0, 0, 0, 2)) for line, style in _notes(report)),
    )


def package_line(report: BenchReport) -> str:
    """``./out · 25 % removed · bf16 · 144 prototypes, 52 % resident``."""
    package = report.facts.package
    parts = [path_text(package["path"])]
    if not package["prototypes"]:
        return " · ".join([*parts, "unchanged, every expert resident"])
    rate = package["rate"]
    parts.append(f"{percent(rate)} removed" if rate else "nothing removed")
    parts.append(precision_name(package["precision"]))
    share = percent_whole(package["resident"] / package["prototypes"])
    return " · ".join([*parts, f"{package['prototypes']:,} prototypes, {share} resident"])


def machine_line(report: BenchReport) -> str:
    """``2 threads · memory 18.2 GB/s · disk 0.61 GB/s · 95 GFLOP/s``, then GOP/s of bytes if a prompt has any."""
    facts, budget = report.facts, report.facts.budget
    parts = ["GPU" if budget.device == "cuda" else counted(facts.threads, "thread")]
    rates = [("memory", budget.device_bandwidth), ("disk", budget.disk_bandwidth)]
    if budget.device == "cuda":
        rates.insert(1, ("link", budget.link_bandwidth))
    parts += [f"{name} {rate / _GB:.3g} GB/s" for name, rate in rates if rate]
    parts.append(f"{facts.flops_per_second / 1e9:,.0f} GFLOP/s")
    if facts.prompt_byte_operations:
        parts.append(f"{facts.byte_operations_per_second / 1e9:,.0f} GOP/s")
    return " · ".join(parts)


def runtime_line(report: BenchReport) -> str:
    """Kernel, cache policy and way of reading, as far as they matter and have names."""
    package, runtime = report.facts.package, report.facts.runtime
    if not package["prototypes"]:
        return "experts as transformers runs them"
    moving = package["resident"] < package["prototypes"]
    shown = ("kernel", "policy", "reads") if moving else ("kernel",)
    return " · ".join(f"{what} {runtime[what]}" for what in shown if runtime[what])


def _head(label: str, value: str) -> Text:
    return Text.assemble((f"{label:<9}", "bold"), value)


def _figures(report: BenchReport) -> Table:
    prompt = report.facts.settings["prompt_tokens"]
    tokens = report.facts.settings["tokens"]
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(min_width=22, no_wrap=True)
    table.add_column(no_wrap=True, min_width=22)
    table.add_column(no_wrap=True)
    table.add_row("", _bold(f"decode, {counted(tokens, 'token')}"), _bold(f"prefill of {prompt:,}"))
    decode, prefill = report.decode, report.prefill
    rows = [
        ("tokens/s", _spread(decode.tokens_per_second), _spread(prefill.tokens_per_second)),
        ("first token", "", _seconds(report.first_token_seconds.median)),
        ("bound, one by one", _bound(decode, "serial"), _bound(prefill, "serial")),
        ("share of that bound", percent_text(decode.share), percent_text(prefill.share)),
        (
            "share if overlapped",
            percent_text(decode.share_overlapped),
            percent_text(prefill.share_overlapped),
        ),
        ("hit rate", percent_text(decode.hit_rate), percent_text(prefill.hit_rate)),
        ("read from memory", _size(decode.memory_bytes), ""),
        ("brought from host", _size(decode.host_bytes), _size(prefill.host_bytes)),
        ("brought from disk", _size(decode.disk_bytes), _size(prefill.disk_bytes)),
        ("waiting for them", _waiting(decode), _waiting(prefill)),
    ]
    for label, one, other in rows:
        if label == "brought from host" and report.facts.budget.device == "cpu":
            continue  # there is no tier between RAM and disk
        bold = label in ("tokens/s", "share of that bound")
        table.add_row(f"  {label}", one, other, style="bold" if bold else "")
    return table


def _other_hits(expected: float, with_reads: float | None) -> bool:
    """Whether more or fewer prototypes were there than the plan takes for granted, as far as it shows in speed."""
    return with_reads is not None and not 0.95 < with_reads / expected < 1.05


def _with_hits(report: BenchReport) -> str:
    assert report.expected_reads is not None
    ratio = report.decode.tokens_per_second.median / report.expected_reads
    return f"With the hits that were measured {report.expected_reads:.1f} tokens/s are expected; measured ×{ratio:.2f}"


def _notes(report: BenchReport) -> list[tuple[str, str]]:
    facts, lines = report.facts, []
    ratio = report.expected_ratio
    if facts.expected is not None and ratio is not None:
        text = f"Expected {facts.expected:.1f} tokens/s by the speed model; measured ×{ratio:.2f}"
        if facts.planned is not None:
            text += f"; the plan said {facts.planned:.1f}"
        lines.append((text, ""))
        if _other_hits(facts.expected, report.expected_reads):
            lines.append((_with_hits(report), ""))
    if facts.expected_prompt is not None and report.prompt_ratio is not None:
        seconds, ratio = _seconds(facts.expected_prompt), report.prompt_ratio
        lines.append(
            (f"Expected {seconds} for the prompt; measured ×{ratio:.2f} of that speed", "")
        )
    limit = facts.budget.device_bytes
    unit, tier = unit_for(limit), tier_name(facts.budget)
    text = f"{tier} {unit.text(report.memory_used)} of {unit.text(limit)} {unit.name} in use"
    lines.append((text, ""))
    lines.append((_LEGEND, "dim"))
    return lines


def _bold(text: str) -> Text:
    return Text(text, style="bold")


def number(value: float) -> str:
    """Three or four digits: ``1.4``, ``35.2``, ``512``, ``8,167``."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 100 else f"{value:.1f}"


def _spread(one: Spread) -> str:
    return f"{number(one.median)}  ({number(one.low)}–{number(one.high)})"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _bound(phase: PhaseReport, which: str) -> str:
    return "?" if phase.bound is None else number(1.0 / getattr(phase.bound, which))


def percent_text(share: float | None) -> str:
    """Tenths of a percent; a dash where there is nothing to say."""
    return "–" if share is None else f"{100 * share:.1f} %"


def _size(nbytes: float | None) -> str:
    return "–" if not nbytes else human_size(round(nbytes))


def _waiting(phase: PhaseReport) -> str:
    if not phase.waited_seconds:
        return "–"
    return f"{phase.waited_seconds * 1e3:.2f} ms  ({percent_whole(phase.waited_share)})"
