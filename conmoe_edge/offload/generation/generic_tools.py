"""Tools for models whose chat template knows none: they are described in the system message, and a call is asked for in
``<tool_call>`` tags, which is the form that most models have seen.

Earlier calls and what came of them become text of the conversation in the same form. How well a model keeps to it is
the model's affair; an answer that has to call a tool is held to it by a grammar. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from conmoe_edge.offload.generation.tool_forms import Tools

_ASK = """\
You can call these functions. Each line is one of them, as JSON:
{tools}

To call one, write its name and its arguments as JSON between tags, and nothing else:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
What it gives comes back between <tool_response> tags. Answer in plain text where no function is needed."""


def tools_as_text(messages: Sequence[Mapping[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """``messages`` with everything about tools in their text.

    Args:
        messages: plain, oldest first; answers may have ``tool_calls``, and what came of them is of role ``tool``.
        tools: those that may be called; may be none.
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        plain = {k: v for k, v in message.items() if k not in ("tool_calls", "tool_call_id")}
        if message.get("role") == "tool":
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if found and found[-1].get("answers_calls"):
                found[-1]["content"] += f"\n{text}"
            else:
                found.append({"role": "user", "content": text, "answers_calls": True})
            continue
        calls = [_call_text(call["function"]) for call in message.get("tool_calls") or ()]
        if calls:
            plain["content"] = "\n".join(filter(None, [str(plain.get("content") or ""), *calls]))
        found.append(plain)
    for message in found:
        message.pop("answers_calls", None)
    return _with_system(found, tools) if tools else found


def _call_text(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _with_system(messages: list[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _ASK.format(tools=lines)
    if messages and messages[0].get("role") == "system":
        first = {**messages[0], "content": f"{messages[0].get('content') or ''}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
