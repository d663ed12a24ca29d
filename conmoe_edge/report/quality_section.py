"""The quality receipt: rise of the loss and divergence, by domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conmoe_edge.report.markup import Markup, figure, stretched, table, tag, text
from conmoe_edge.report.match_rows import MATCH_HEADERS, MATCH_LEAD, match_rows
from conmoe_edge.report.package_summary import PackageSummary

_HEADERS = ("text", "tokens", "loss before", "after", "rise", "perplexity", "KL", "same top")
_WIDE = frozenset({1, 2, 3})
_WIDE_MATCH = frozenset({1})


def quality(facts: PackageSummary) -> Markup:
    """The whole section; nothing where nothing was measured."""
    receipt = facts.manifest.receipt
    if not receipt:
        return Markup("")
    domains = receipt.get("per_domain")
    rows = [("all", receipt)]
    if isinstance(domains, dict):
        rows += [(name, one) for name, one in sorted(domains.items()) if isinstance(one, dict)]
    most = {
        name: max((abs(v) for _, row in rows if (v := value(row)) is not None), default=0.0)
        for name, value in (("rise", _rise), ("kl", _kl))
    }
    body = [_row(name, row, most) for name, row in rows]
    return figure(
        "What it cost in quality",
        tag("div", table(_HEADERS, body, _WIDE), class_="quality"),
        *_exact(receipt),
        lead="The written package against the original, on text that calibration did not see. Loss in nats a "
        "token; KL is how far the package's distribution of the next token is from the original's.",
        id_="quality",
    )


def _exact(receipt: Mapping[str, Any]) -> list[Markup]:
    """What greedy decoding writes; nothing where a receipt has no counts of it."""
    rows = match_rows(receipt)
    if not rows:
        return []
    shown = tag("div", table(MATCH_HEADERS, rows, _WIDE_MATCH), class_="quality exact")
    return [tag("p", text(MATCH_LEAD), class_="lead"), shown]


def _row(name: str, row: Mapping[str, Any], most: Mapping[str, float]) -> tuple[str, ...]:
    rise, kl = _rise(row), _kl(row)
    ratio, same = _number(row, "perplexity_ratio"), _number(row, "top1_agreement")
    tokens = _number(row, "tokens")
    return (
        text(name),
        "" if tokens is None else f"{tokens:,.0f}",
        _figure(_number(row, "loss_original"), ".3f"),
        _figure(_number(row, "loss_consolidated"), ".3f"),
        _barred(rise, "+.3f", most["rise"]),
        "" if ratio is None else f"×{ratio:.3f}",
        _barred(kl, ".4f", most["kl"]),
        "" if same is None else f"{100 * same:.1f} %",
    )


def _barred(value: float | None, form: str, most: float) -> Markup:
    if value is None:
        return Markup("")
    width = 100.0 * abs(value) / most if most else 0.0
    bar = tag("rect", x=100.0 - width, y=0.0, width=width, height=4.0, class_="loss")
    return tag(
        "div",
        tag("span", format(value, form)),
        stretched(bar, wide=100.0, high=4.0, label=format(value, form), class_="under"),
        class_="barred",
    )


def _rise(row: Mapping[str, Any]) -> float | None:
    before, after = _number(row, "loss_original"), _number(row, "loss_consolidated")
    return None if before is None or after is None else after - before


def _kl(row: Mapping[str, Any]) -> float | None:
    return _number(row, "kl")


def _number(row: Mapping[str, Any], key: str) -> float | None:
    """The receipt is a reader's: what is not a number is left out."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
