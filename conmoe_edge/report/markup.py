"""HTML and SVG as text that cannot be broken by what it shows: whatever is not ``Markup`` is escaped.

What comes out is well-formed XML as well, so that tests can read it.
"""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


_VOID = frozenset({"meta", "br", "col", "rect", "path", "line", "polyline"})


def text(value: object) -> Markup:
    """The value as text: escaped, without what no page may hold (controls, halves of characters)."""
    kept = "".join(
        c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
    return Markup(escape(kept, quote=True))


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """``<name attribute="...">children</name>``. ``class_`` is ``class``, ``_`` in a name is ``-``; an attribute that
    is ``None`` is left out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = number(value) if isinstance(value, float) else value
            words.append(f'{key.rstrip("_").replace("_", "-")}="{text(shown)}"')
    if name in _VOID and not children:
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{join(*children)}</{name}>")


def join(*pieces: str) -> Markup:
    """The pieces one after the other."""
    return Markup("".join(p if isinstance(p, Markup) else text(p) for p in pieces))


def number(value: float) -> str:
    """At most three decimals, without zeros at the end."""
    return f"{value:.3f}".rstrip("0").rstrip(".") or "0"


def stretched(*shapes: str, wide: float, high: float, label: str, class_: str = "") -> Markup:
    """A picture without text that fills its box, whatever that measures; text stands beside it as HTML."""
    return tag(
        "svg",
        *shapes,
        class_=f"fill {class_}".strip(),
        viewBox=f"0 0 {number(wide)} {number(high)}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


def figure(title: str, *children: str, lead: str = "", tip: str = "", id_: str = "") -> Markup:
    """A section: heading, a sentence on how to read it, the picture, and a line for what is pointed at."""
    parts: list[str] = [tag("h2", title)]
    if lead:
        parts.append(tag("p", lead, class_="lead"))
    parts += children
    if tip:
        parts.append(tag("p", tip, class_="tip", aria_live="polite"))
    return tag("section", *parts, id=id_ or None)


def key(title: str, *entries: tuple[str, str]) -> Markup:
    """A legend: sample (markup) and word; nothing without entries."""
    items = [tag("li", sample, Markup(" "), text(word)) for sample, word in entries]
    heading = [tag("li", title, class_="title")] if title else []
    return tag("ul", *heading, *items, class_="key") if items else Markup("")


def table(
    headers: tuple[str, ...], rows: list[tuple[str, ...]], wide: frozenset[int] = frozenset()
) -> Markup:
    """A table; first column left, the others right; the columns ``wide`` are left out on a phone."""

    def cells(name: str, row: tuple[str, ...]) -> Markup:
        return tag(
            "tr",
            *(
                tag(
                    "th" if index == 0 or name == "th" else "td",
                    cell,
                    class_="wide" if index in wide else None,
                    scope="col" if name == "th" else "row" if index == 0 else None,
                )
                for index, cell in enumerate(row)
            ),
        )

    return tag(
        "table", tag("thead", cells("th", headers)), tag("tbody", *(cells("td", r) for r in rows))
    )
