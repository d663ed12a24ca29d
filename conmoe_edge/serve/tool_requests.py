"""Tools, choices and calls as requests have them, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from conmoe_edge.serve.http_errors import ApiError

MOST_TOOLS = 128
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class Function(BaseModel):
    """What can be called."""

    model_config = STRICT
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """The only kind of tool there is."""

    model_config = STRICT
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = self.function
        schema = function.parameters or {"type": "object", "properties": {}}
        described = {"name": function.name, "description": function.description or ""}
        return {"type": "function", "function": {**described, "parameters": schema}}


def function_tools(
    tools: Any,
    fields: Mapping[str, str],
    kind: str,
    ignored: list[str],
    *,
    usual: str | None = None,
) -> list[dict[str, Any]]:
    """Another API's tools as OpenAI's chat has them; those that its makers' own servers run are left out and named.

    Args:
        tools: as the request has them.
        fields: of a function, each with that API's name for it.
        kind: of a tool that the client runs.
        ignored: gets the names of what is left out.
        usual: the kind of a tool that does not say.

    Raises:
        ApiError: they are no list of objects.
    """
    if not isinstance(tools, list):
        raise ApiError(400, "tools: a list.", param="tools")
    found = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ApiError(400, f"tools[{index}]: an object.", param="tools")
        given = tool.get("type") or usual
        if given != kind:
            ignored.append(f"tools[{index}] ({given})")
            continue
        function = {name: tool[other] for name, other in fields.items() if other in tool}
        found.append({"type": "function", "function": function})
    return found


class NamedFunction(BaseModel):
    """A function by its name."""

    model_config = STRICT
    name: ToolName


class NamedTool(BaseModel):
    """A choice of one tool."""

    model_config = STRICT
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(BaseModel):
    """What an earlier answer called; ``arguments`` is JSON text."""

    model_config = STRICT
    name: ToolName
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, value: str) -> str:
        try:
            given = json.loads(value or "{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ValueError("the arguments of a call are a JSON object, as text")
        return value or "{}"


class ToolCall(BaseModel):
    """A call in an earlier answer."""

    model_config = STRICT
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: the arguments are an object."""
        arguments = json.loads(self.function.arguments)
        called = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": called}
