"""Tools of other APIs in the form of OpenAI's chat."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.serve.anthropic_api import chat_of_messages
from conmoe_edge.serve.http_errors import ApiError
from conmoe_edge.serve.responses_api import chat_of_response

SCHEMA = {"type": "object", "properties": {"river": {"type": "string"}}}
INSIDE = {"name": "length", "description": "of a river", "parameters": SCHEMA}


def of_response(tools: Any) -> tuple[dict[str, Any], list[str]]:
    return chat_of_response({"input": "x", "tools": tools})


def of_messages(tools: Any) -> tuple[dict[str, Any], list[str]]:
    said = [{"role": "user", "content": "x"}]
    return chat_of_messages({"messages": said, "max_tokens": 1, "tools": tools})


def test_both_come_to_the_same() -> None:
    theirs = {"name": "length", "description": "of a river", "input_schema": SCHEMA}
    response, left_out = of_response([{"type": "web_search"}, {"type": "function", **INSIDE}])
    assert left_out == ["tools[0] (web_search)"]
    message, left_out = of_messages([theirs, {"type": "bash_20250124", "name": "bash"}])
    assert left_out == ["tools[1] (bash_20250124)"]
    assert response["tools"] == message["tools"] == [{"type": "function", "function": INSIDE}]
    assert of_messages([{"type": "custom", **theirs}])[0]["tools"] == message["tools"]


@pytest.mark.parametrize("ask", [of_response, of_messages])
@pytest.mark.parametrize("tools", [{"name": "length"}, "length", 3])
def test_what_is_no_list_is_refused(ask: Any, tools: Any) -> None:
    with pytest.raises(ApiError, match="a list"):
        ask(tools)
    with pytest.raises(ApiError, match=r"tools\[1\]: an object"):
        ask([{"type": "function"}, "length"])
