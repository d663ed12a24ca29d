"""Conversations in an order that the chat template takes, nothing of them lost.

Coding agents open with several system messages, send further ones later, and several messages of the user in a row.
Many templates know one system message, the first, and turns that alternate; they refuse the rest, or drop it without
a word. What a template takes is found by giving it small conversations, so it depends on the template alone.

- System messages at the beginning become one: models were trained on one.
- A later one becomes the user's where the template does not write it.
- The user's messages in a row become one where the template does not write both.

Texts only, joined by a blank line; pure but for the rendering.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from conmoe_edge.offload.generation.chat_template import shared
from conmoe_edge.offload.generation.prompt import SYSTEM_ROLES

Messages = Sequence[Mapping[str, Any]]
_PROBE = "probe_7c02be"
_LATER_SYSTEM = ("system:a", "user:b", f"system:{_PROBE}", "assistant:c", "user:d")
_USERS_IN_A_ROW = (f"user:{_PROBE}", "user:b")


def in_order(messages: Messages, template: str, variables: Mapping[str, Any]) -> list[Any]:
    """``messages`` as ``template`` takes them; the same ones where it takes them as they are.

    Args:
        messages: plain, oldest first.
        template: Jinja; empty for a model without one.
        variables: what it sees besides.

    Raises:
        ConmoeError: as ``TemplateRenderer.taken``; whether the template takes them is then not known.
    """
    found = _opening_joined(messages)
    if not template:
        return found
    given = json.dumps(dict(variables), sort_keys=True)
    later = any(_is_system(one) for one in found[1:])
    if later and not _writes(template, given, _LATER_SYSTEM):
        found = [
            found[0],
            *({**one, "role": "user"} if _is_system(one) else one for one in found[1:]),
        ]
    if any(_are_users(*pair) for pair in itertools.pairwise(found)) and not _writes(
        template, given, _USERS_IN_A_ROW
    ):
        found = _users_joined(found)
    return found


def _opening_joined(messages: Messages) -> list[Any]:
    count = next((n for n, one in enumerate(messages) if not _is_system(one)), len(messages))
    if count < 2:
        return list(messages)
    return [_joined(messages[:count]), *messages[count:]]


def _users_joined(messages: Messages) -> list[Any]:
    found: list[Any] = []
    for message in messages:
        if found and _are_users(found[-1], message):
            found[-1] = _joined([found[-1], message])
        else:
            found.append(message)
    return found


def _joined(messages: Messages) -> dict[str, Any]:
    texts = (str(one.get("content") or "") for one in messages)
    return {**messages[0], "content": "\n\n".join(filter(None, texts))}


def _is_system(message: Mapping[str, Any]) -> bool:
    return message.get("role") in SYSTEM_ROLES


def _are_users(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.get("role") == other.get("role") == "user"


@functools.lru_cache(maxsize=16)
def _writes(template: str, variables: str, turns: tuple[str, ...]) -> bool:
    """Whether a template takes such a conversation and writes the probe in it."""
    pairs = (turn.split(":") for turn in turns)
    messages = [{"role": role, "content": text} for role, text in pairs]
    return _PROBE in (shared.taken(template, messages, json.loads(variables)) or "")
