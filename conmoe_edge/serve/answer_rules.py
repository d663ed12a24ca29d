"""What an answer has to be, by what its request says: a schema, a call, and how long it may reason.

Raises ``UsageError`` for what cannot be enforced, which becomes a 400.
"""

from __future__ import annotations

from dataclasses import replace

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.answer_form import AnswerForm
from conmoe_edge.offload.generation.grammar import Grammar
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.tool_forms import Tools, calls_grammar, name_of, speller
from conmoe_edge.serve.jobs import Loaded
from conmoe_edge.serve.requests import ChatRequest
from conmoe_edge.serve.tool_requests import NamedTool


def answer_rule(
    asked: ChatRequest, form: AnswerForm, tools: Tools, loaded: Loaded
) -> SamplingSettings:
    """The settings that a conversation asks for, held to what its answer has to be.

    Raises:
        UsageError: that cannot be enforced.
    """
    thinking = form.thinking
    if asked.thinking_budget is not None and thinking is not None:
        thinking = replace(thinking, budget=asked.thinking_budget)
    grammar = _grammar(asked, form, tools, loaded)
    return form.settings(replace(asked.sampling, grammar=grammar, thinking=thinking))


def _grammar(asked: ChatRequest, form: AnswerForm, tools: Tools, loaded: Loaded) -> Grammar | None:
    schema = None if asked.response_format is None else asked.response_format.wanted
    forced = asked.tool_choice == "required" or isinstance(asked.tool_choice, NamedTool)
    if schema is None and not forced:
        return None
    grammars = loaded.grammars
    if grammars is None:
        raise UsageError("Answers cannot be held to a schema here.", "", "ask without one")
    if not forced:
        assert schema is not None
        if tools:
            raise UsageError(
                "An answer of a schema cannot call tools.",
                "response_format and tools are both given",
                "tool_choice none, or no response_format",
            )
        return grammars.json_schema(schema)
    assert form.calls is not None, "there are tools"
    if isinstance(asked.tool_choice, NamedTool):
        wanted = asked.tool_choice.function.name
        tools = [tool for tool in tools if name_of(tool) == wanted]
    several = asked.parallel_tool_calls is not False and asked.tool_choice == "required"
    return grammars.lark(
        calls_grammar(form.calls, tools, speller(loaded.tokenizer), several=several)
    )
