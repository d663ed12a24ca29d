"""What ``eval`` shows: what it will take, the figures, the scores of tasks. Decides and prints nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from conmoe_edge.cli.ui.text import counted, percent, printable
from conmoe_edge.cli.views.match_lines import match_lines
from conmoe_edge.cli.views.plan_views import precision_name, table_view
from conmoe_edge.units import human_size

if TYPE_CHECKING:
    from conmoe_edge.compress.quality.metrics import Cost, Evaluated, EvaluationReport, Quality
    from conmoe_edge.integrations.harness import TaskReport


def cost_lines(cost: Cost) -> Iterator[str]:
    """What an evaluation will take."""
    each = " through each of two models" if cost.models == 2 else ""
    yield f"{cost.tokens:,} tokens{each}, one layer in memory at a time."
    if not cost.steps:
        return
    line = f"{counted(cost.prompts, 'continuation')} of {counted(cost.steps, 'token')}, "
    if all(cost.held):
        size = human_size(max(cost.memory_bytes))
        yield f"{line}with the model held in memory ({size})."
    else:
        size = human_size(cost.repeated_bytes)
        yield f"{line}one layer at a time: {size} are loaded for them. --continuations 0 leaves them out."


def evaluation_view(report: EvaluationReport) -> RenderableType:
    """Names, the table, what greedy decoding writes, and how to read it."""
    parts: list[RenderableType] = [_named("Model", report.model)]
    if report.reference is not None:
        parts.append(_named("Against", report.reference))
        if report.reference.origin is False:
            note = "         not the model that the package was made from"
            parts.append(Text(note, style="yellow"))
    parts += [Text(), _table(report)]
    generated = list(match_lines(report.exact_match))
    if report.continuations is not None:
        generated.append(_continued(report))
    if generated:
        parts += [Text(), *(Text(line) for line in generated)]
    parts.append(Text())
    if report.reference is None:
        parts.append(Text(f"Compared with nothing: {printable(report.alone)}.", style="dim"))
    else:
        parts.append(Text("Loss in nats a token; KL of the model from the reference.", style="dim"))
    return Group(*parts)


def _named(label: str, one: Evaluated) -> Text:
    facts = []
    if one.method is not None and one.rate is not None:
        facts += [one.method, f"{percent(one.rate)} of the experts removed"]
        if one.scope is not None and one.scope > 1:
            facts.append(f"scope {one.scope}")
        if one.precision not in (None, "source"):
            facts.append(f"prototypes in {precision_name(one.precision)}")
        if one.dense_precision not in (None, "source"):
            facts.append(f"dense in {one.dense_precision}")
        facts.append(f"{human_size(one.experts_bytes)} of prototypes")
    else:
        facts.append(f"{human_size(one.experts_bytes)} of experts")
    if one.kv_precision != "source":
        facts.append(f"keys and values in {one.kv_precision}")
    return Text.assemble(
        (f"{label:<9}", "bold"), printable(one.name), (f"   {' · '.join(facts)}", "dim")
    )


def _table(report: EvaluationReport) -> RenderableType:
    rows = [("all", report.quality), *sorted(report.per_domain.items())]
    if report.reference is None:
        cells = [
            [name, f"{q.tokens:,}", f"{q.loss:.4f}", f"{q.perplexity:.3f}"] for name, q in rows
        ]
        return table_view(["", "tokens", "loss", "perplexity"], cells, frozenset({1, 2, 3}))
    headers = ["", "tokens", "loss", "reference", "rise", "perplexity", "ratio", "KL"]
    headers += ["same top-1", "overlap"]
    return table_view(
        headers, [_compared(name, q) for name, q in rows], frozenset(range(1, len(headers)))
    )


def _compared(name: str, q: Quality) -> list[str]:
    assert q.reference_loss is not None and q.kl is not None and q.perplexity_ratio is not None
    assert q.top1_agreement is not None and q.overlap is not None
    return [
        name,
        f"{q.tokens:,}",
        f"{q.loss:.4f}",
        f"{q.reference_loss:.4f}",
        f"{q.loss - q.reference_loss:+.4f}",
        f"{q.perplexity:.2f}",
        f"×{q.perplexity_ratio:.3f}",
        f"{q.kl:.4f}",
        f"{100 * q.top1_agreement:.1f} %",
        f"{100 * q.overlap:.1f} %",
    ]


def _continued(report: EvaluationReport) -> str:
    found = report.continuations
    assert found is not None
    text = f"{counted(found.prompts, 'greedy continuation')} of up to {counted(found.tokens, 'token')}: "
    text += _share(found.repetition) + " of the 4-grams repeat"
    if report.reference is not None:
        text += f" (reference {_share(found.reference_repetition)})"
        text += f", the first {found.common_tokens:.1f} tokens are the same"
    return text


def _share(value: float | None) -> str:
    return "none there" if value is None else f"{100 * value:.1f} %"


def tasks_view(report: TaskReport) -> RenderableType:
    """One line a metric."""
    rows = []
    for score in report.scores:
        better = {True: "↑", False: "↓", None: ""}[score.higher_is_better]
        rows.append(
            [
                score.task,
                f"{score.metric} {better}".rstrip(),
                "" if score.filter == "none" else score.filter,
                f"{score.value:.4f}",
                "" if score.stderr is None else f"±{score.stderr:.4f}",
                "" if score.examples is None else f"{score.examples:,}",
                "" if score.fewshot is None else str(score.fewshot),
            ]
        )
    headers = ["task", "metric", "filter", "value", "", "examples", "few-shot"]
    return Group(
        table_view(headers, rows, frozenset({3, 4, 5, 6})),
        Text(f"By lm-eval {report.harness}, one question at a time.", style="dim"),
    )
