"""The chat templates of a tokenizer that has several (``default``, ``tool_use``, ``rag``), by name. Pure."""

from __future__ import annotations

from typing import Any

from conmoe_edge.errors import UsageError

DEFAULT = "default"
"""What the only template of a tokenizer is called, and the one of several that is taken unasked."""


def templates_of(tokenizer: Any) -> dict[str, str]:
    """Its templates by name, sorted; empty where it has none."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        return {str(name): found[name] for name in sorted(found, key=str)}
    return {DEFAULT: found} if found else {}


def choose_template(tokenizer: Any, name: str) -> None:
    """Let ``tokenizer`` have the one template that is called ``name``.

    Raises:
        UsageError: it has none of that name.
    """
    templates = templates_of(tokenizer)
    if name in templates:
        tokenizer.chat_template = templates[name]
        return
    if not templates:
        raise UsageError(
            f"There is no chat template {name[:60]!r}.",
            "the model has none at all",
            "the same command without --template",
        )
    raise UsageError(
        f"There is no chat template {name[:60]!r}.",
        f"the model has: {', '.join(templates)}"[:200],
        f"--template {next(iter(templates))}",
    )


def default_template(tokenizer: Any) -> str:
    """The template that is taken unasked; empty where there is none.

    Raises:
        UsageError: there are several, and none is called default.
    """
    templates = templates_of(tokenizer)
    if len(templates) > 1 and DEFAULT not in templates:
        raise UsageError(
            "The model has several chat templates, and none is called default.",
            f"they are called {', '.join(templates)}"[:200],
            f"name one: --template {next(iter(templates))}",
        )
    return templates.get(DEFAULT) or next(iter(templates.values()), "")
