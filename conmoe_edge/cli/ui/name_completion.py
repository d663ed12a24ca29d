"""What completion offers for names: aliases, profiles, methods. Quick, without torch, and silent about damage."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from conmoe_edge.errors import ConmoeError

_PRUNING = {
    "frequency": "removes the least used experts",
    "seer": "removes those with the least routing weight",
    "ean": "removes those with the least output",
    "reap": "removes those with the least mean contribution",
    "man": "removes by mean output",
    "msan": "removes by mean squared output",
    "energy": "removes those with the least energy",
}
METHODS = {
    "auto": "loses least: measured, trimmed, refitted",
    "conmoe": "as published, weights unchanged",
    **_PRUNING,
    **{f"{name}+drop": f"{what}, the router left alone" for name, what in _PRUNING.items()},
    "mone": "constants in place of the removed",
    "hc-smoe": "merges clusters of like outputs",
    "m-smoe": "merges groups of like routing, neurons aligned",
    "mc-smoe": "m-smoe, stored as low rank and a few columns",
    "mergemoe": "merges groups, least squares for the rest",
}
"""The methods of ``compress/methods``, which cannot be asked without torch; a test compares them."""
_SIZES = ("6GB", "8GB", "12GB", "16GB", "24GB")

Names = Callable[[], Iterable[tuple[str, str]]]


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Aliases, and folders."""
    from conmoe_edge.checkpoint.sources.model_names import aliases

    items = _matching(lambda: aliases().items(), incomplete)
    return [*items, CompletionItem(incomplete, type="dir")]


def complete_own_alias(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The user's own aliases."""
    from conmoe_edge.checkpoint.sources.model_names import own_aliases

    return _matching(lambda: own_aliases().items(), incomplete)


def complete_profile(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of profiles."""
    return _matching(_profiles, incomplete)


def complete_budget(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """``auto``, profiles, and some sizes once a digit is there."""

    def names() -> Iterable[tuple[str, str]]:
        yield "auto", "this machine"
        yield from _profiles()
        if incomplete[:1].isdigit():
            yield from ((size, "") for size in _SIZES)

    return _matching(names, incomplete)


def complete_method(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of methods."""
    return _matching(METHODS.items, incomplete)


def _profiles() -> Iterable[tuple[str, str]]:
    from conmoe_edge.memory.profiles import list_profiles

    return [(one.name, one.title) for one in list_profiles()]


def _matching(names: Names, incomplete: str) -> list[CompletionItem]:
    """The items that go on from what is typed; none where a file of the user's is damaged."""
    try:
        found = list(names())
    except (ConmoeError, OSError):
        return []
    wanted = incomplete.lower()
    return [
        CompletionItem(name, help=" ".join(note.split()) or None)
        for name, note in found
        if name.lower().startswith(wanted)
    ]
