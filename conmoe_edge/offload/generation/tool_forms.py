"""How families of models write the tools that they call: the marks in a text, the calls between them, and the grammar
that has no other text.

The form of a model is known by its chat template, which writes earlier calls in it. Where a template knows no tools,
or its form is none of these, ``generic_tools.py`` asks for them in the form of ``TAGGED``. Strings only.

Sources: the chat templates that Qwen, Mistral AI, DeepSeek, Z.ai (GLM), Moonshot and OpenAI publish with their models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conmoe_edge.offload.generation.answer_parts import Called, CallMarks

Tools = Sequence[Mapping[str, Any]]
"""``{"type": "function", "function": {"name", "description", "parameters"}}``, as templates take them."""

MOST_CALLS = 16
"""In one answer that is held to a grammar."""


@dataclass(frozen=True, slots=True)
class ToolForm:
    """One form.

    Attributes:
        name: for messages and documents.
        marks: where calls stand; ``None`` for harmony, which has a reader of its own.
        rules: the grammar's alternatives for single calls, and how they follow each other: from the tools and from
            ``spell``, which writes a text that may have control tokens in it.
    """

    name: str
    marks: Callable[[Tools], CallMarks] | None
    rules: Callable[[Tools, Spell], Shape]


Spell = Callable[[str], str]
"""A literal of a Lark grammar for a text with marks in it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A grammar of calls: ``before`` the first, one of ``calls``, ``between`` two (``None`` where there is only one),
    ``after`` the last; each a Lark expression."""

    calls: tuple[str, ...]
    before: str = ""
    between: str | None = ""
    after: str = ""


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template writes calls in; ``None`` where it is none of these."""
    if _DEEPSEEK[0] in template:
        return DEEPSEEK_FENCED if "```json" in template else DEEPSEEK
    if _TOOL_CALLS in template:
        return MISTRAL_ARGS if _ARGS in template else MISTRAL
    return next((form for mark, form in _BY_MARK if mark in template), None)


def calls_grammar(form: ToolForm, tools: Tools, spell: Spell, *, several: bool) -> str:
    """The Lark grammar of an answer that calls at least one of ``tools``, and at most one unless ``several``."""
    shape = form.rules(tools, spell)
    names = [f"call_{number}" for number in range(len(shape.calls))]
    one = f"({' | '.join(names)})"
    more = (
        f" ({shape.between} {one}){{0,{MOST_CALLS - 1}}}"
        if several and shape.between is not None
        else ""
    )
    lines = [f"start: {shape.before} {one}{more} {shape.after}"]
    lines += [f"{name}: {rule}" for name, rule in zip(names, shape.calls, strict=True)]
    return "\n".join(lines) + "\n"


def literal(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def speller(tokenizer: Any) -> Spell:
    """A mark that is one token of the tokenizer's own list is that token, and no other text: special as DeepSeek's, or
    plain as Qwen's ``<tool_call>``, which llguidance takes for a control token all the same."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    return lambda text: f"<[{added[text]}]>" if text in added else literal(text)


def _json_arguments(tool: Mapping[str, Any]) -> str:
    from conmoe_edge.offload.generation.grammar import json_rule

    return json_rule(parameters_of(tool))


def parameters_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments: an object."""
    schema = tool["function"].get("parameters") or {}
    return schema if "type" in schema else {"type": "object", **schema}


def name_of(tool: Mapping[str, Any]) -> str:
    """A tool's name."""
    return str(tool["function"]["name"])


# Calls as JSON objects: {"name": ..., "arguments": {...}}


def json_calls(body: str) -> list[Called]:
    """One call or a list of them.

    Raises:
        ValueError: it is none.
    """
    given = json_value(body)
    return [_json_call(one) for one in (given if isinstance(given, list) else [given])]


def _json_call(value: Any) -> Called:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no name")
    given = value.get("arguments", value.get("parameters", {}))
    return Called(value["name"], _arguments_text(given))


def _arguments_text(given: Any) -> str:
    if isinstance(given, str):
        given = json_value(given)
    if not isinstance(given, dict):
        raise ValueError("the arguments are no object")
    return json.dumps(given, ensure_ascii=False)


def json_value(text: str) -> Any:
    """The value that a text is as JSON.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# <tool_call> ... </tool_call>: JSON (Hermes, Qwen), or names and values in tags (Qwen3-Coder, GLM)

_XML_CALL = re.compile(r"\s*<function=([^>\n]+)>\n?(.*?)(?:</function>)?\s*\Z", re.DOTALL)
_XML_VALUE = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_GLM_CALL = re.compile(r"\s*([A-Za-z0-9_.:/-]+)\s*((?:<arg_key>.*)?)\Z", re.DOTALL)
_GLM_VALUE = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _tagged(tools: Tools) -> CallMarks:
    schemas = {name_of(tool): parameters_of(tool) for tool in tools}

    def read(body: str) -> list[Called]:
        if body.lstrip()[:1] in ("{", "["):
            return json_calls(body)
        for call, value in ((_XML_CALL, _XML_VALUE), (_GLM_CALL, _GLM_VALUE)):
            found = call.match(body)
            if found is not None:
                name = found[1].strip()
                pairs = value.findall(found[2])
                return [Called(name, _typed(pairs, schemas.get(name, {})))]
        raise ValueError("no call")

    return CallMarks("<tool_call>", "</tool_call>", read)


def _typed(pairs: Iterable[tuple[str, str]], schema: Mapping[str, Any]) -> str:
    """Arguments that came as text: a string where the schema says so, else the JSON value it is."""
    known = schema.get("properties") or {}
    values: dict[str, Any] = {}
    for name, text in pairs:
        about = known.get(name)
        if isinstance(about, Mapping) and about.get("type") == "string":
            values[name] = text
            continue
        try:
            values[name] = json_value(text)
        except ValueError:
            values[name] = text
    return json.dumps(values, ensure_ascii=False)


def _hermes_rules(tools: Tools, spell: Spell) -> Shape:
    def rule(tool: Mapping[str, Any]) -> str:
        head = f'\n{{"name": {json.dumps(name_of(tool))}, "arguments": '
        return (
            f"{spell('<tool_call>')} {literal(head)} {_json_arguments(tool)} "
            f"{literal(chr(125) + chr(10))} {spell('</tool_call>')}"
        )

    return Shape(tuple(map(rule, tools)), between=literal("\n"))


def _in_tags(
    tools: Tools,
    spell: Spell,
    head: Callable[[str], str],
    value: Callable[[str], tuple[str, str]],
    tail: str,
) -> Shape:
    """Arguments one after the other between tags: strings as they are, everything else as JSON."""
    from conmoe_edge.offload.generation.grammar import json_rule

    def rule(tool: Mapping[str, Any]) -> str:
        schema = parameters_of(tool)
        needed = set(schema.get("required") or ())
        parts = []
        for name, about in (schema.get("properties") or {}).items():
            begin, end = value(name)
            is_text = isinstance(about, Mapping) and about.get("type") == "string"
            if is_text and "enum" in about:
                choices = " | ".join(literal(str(one)) for one in about["enum"])
                rest = f"({choices}) {literal(end)}"
            elif is_text:
                # One expression with what ends it: a lexer that takes the longest text would take a part of that.
                rest = f"/[^<]*{_pattern(end)}/"
            else:
                rest = f"{json_rule(about)} {literal(end)}"
            part = f"{literal(begin)} {rest}"
            parts.append(part if name in needed else f"({part})?")
        body = " ".join(parts)
        return (
            f"{spell('<tool_call>')} {literal(head(name_of(tool)))} {body} {literal(tail)} "
            f"{spell('</tool_call>')}"
        )

    return Shape(tuple(map(rule, tools)), between=literal("\n"))


def _pattern(text: str) -> str:
    """A text as a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")


def _glm_rules(tools: Tools, spell: Spell) -> Shape:
    def value(name: str) -> tuple[str, str]:
        return f"<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n"

    return _in_tags(tools, spell, lambda name: f"{name}\n", value, "")


def _xml_rules(tools: Tools, spell: Spell) -> Shape:
    def value(name: str) -> tuple[str, str]:
        return f"<parameter={name}>\n", "\n</parameter>\n"

    return _in_tags(tools, spell, lambda name: f"\n<function={name}>\n", value, "</function>\n")


# [TOOL_CALLS], to the end of the answer (Mistral)

_TOOL_CALLS, _ARGS = "[TOOL_CALLS]", "[ARGS]"
_MISTRAL_CALL = re.compile(r"\s*([A-Za-z0-9_.:/-]+)\s*(?:\[CALL_ID\][A-Za-z0-9]*)?\s*(?:\[ARGS\])?")


def _mistral(tools: Tools) -> CallMarks:
    def read(body: str) -> list[Called]:
        if body.lstrip().startswith("["):
            return json_calls(body)
        calls = []
        for one in body.split(_TOOL_CALLS):
            found = _MISTRAL_CALL.match(one)
            if found is None:
                raise ValueError("no name")
            calls.append(Called(found[1], _arguments_text(json_value(one[found.end() :]))))
        return calls

    return CallMarks(_TOOL_CALLS, "", read)


def _mistral_rules(tools: Tools, spell: Spell) -> Shape:
    def rule(tool: Mapping[str, Any]) -> str:
        head = f'{{"name": {json.dumps(name_of(tool))}, "arguments": '
        return f"{literal(head)} {_json_arguments(tool)} {literal(chr(125))}"

    return Shape(
        tuple(map(rule, tools)),
        before=f"{spell(_TOOL_CALLS)} {literal('[')}",
        between=literal(", "),
        after=literal("]"),
    )


def _mistral_args_rules(tools: Tools, spell: Spell) -> Shape:
    def rule(tool: Mapping[str, Any]) -> str:
        return (
            f"{spell(_TOOL_CALLS)} {literal(name_of(tool))} {spell(_ARGS)} {_json_arguments(tool)}"
        )

    return Shape(tuple(map(rule, tools)))


# Marks around all calls and around each (DeepSeek, Kimi)

_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?\s*([A-Za-z0-9_.:/-]+)\s*(?:<｜tool▁sep｜>)?"
    r"\s*(?:```json\n)?(.*?)(?:\n```)?\s*(?:<｜tool▁call▁end｜>|\Z)",
    re.DOTALL,
)
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_CALL = re.compile(
    r"<\|tool_call_begin\|>\s*(?:functions\.)?([A-Za-z0-9_./-]+)(?::\d+)?\s*"
    r"<\|tool_call_argument_begin\|>(.*?)(?:<\|tool_call_end\|>|\Z)",
    re.DOTALL,
)


def _sectioned(begin: str, end: str, call: re.Pattern[str]) -> Callable[[Tools], CallMarks]:
    def read(body: str) -> list[Called]:
        return [
            Called(name, _arguments_text(json_value(given))) for name, given in call.findall(body)
        ]

    return lambda tools: CallMarks(begin, end, read)


def _deepseek_rules(tools: Tools, spell: Spell, *, fenced: bool) -> Shape:
    def rule(tool: Mapping[str, Any]) -> str:
        name, begin = name_of(tool), spell("<｜tool▁call▁begin｜>")
        separator, end = spell("<｜tool▁sep｜>"), spell("<｜tool▁call▁end｜>")
        if fenced:
            head = f"{begin} {literal('function')} {separator} {literal(name + chr(10) + '```json' + chr(10))}"
            return f"{head} {_json_arguments(tool)} {literal(chr(10) + '```')} {end}"
        return f"{begin} {literal(name)} {separator} {_json_arguments(tool)} {end}"

    between = literal("\n") if fenced else ""
    return Shape(tuple(map(rule, tools)), spell(_DEEPSEEK[0]), between, spell(_DEEPSEEK[1]))


def _kimi_rules(tools: Tools, spell: Spell) -> Shape:
    def rule(tool: Mapping[str, Any]) -> str:
        head = f"{spell('<|tool_call_begin|>')} {literal(f'functions.{name_of(tool)}:')} /[0-9]/"
        middle = spell("<|tool_call_argument_begin|>")
        return f"{head} {middle} {_json_arguments(tool)} {spell('<|tool_call_end|>')}"

    return Shape(tuple(map(rule, tools)), before=spell(_KIMI[0]), after=spell(_KIMI[1]))


# harmony (gpt-oss)


def _harmony_rules(tools: Tools, spell: Spell) -> Shape:
    """One call an answer: ``<|call|>`` ends it. Reasoning may stand before it."""

    def rule(tool: Mapping[str, Any]) -> str:
        head = literal(f"commentary to=functions.{name_of(tool)} ")
        return (
            f"{spell('<|channel|>')} {head} {spell('<|constrain|>')} {literal('json')} "
            f"{spell('<|message|>')} {_json_arguments(tool)}"
        )

    reasoning = (
        f"({spell('<|channel|>')} {literal('analysis')} {spell('<|message|>')} /(.|\\n)*/ "
        f"{spell('<|end|>')} {spell('<|start|>')} {literal('assistant')})?"
    )
    return Shape(tuple(map(rule, tools)), before=reasoning, between=None)


TAGGED = ToolForm("JSON in <tool_call>", _tagged, _hermes_rules)
GLM = ToolForm("GLM's tags in <tool_call>", _tagged, _glm_rules)
XML = ToolForm("<function=...> in <tool_call>", _tagged, _xml_rules)
MISTRAL = ToolForm("[TOOL_CALLS] and a list", _mistral, _mistral_rules)
MISTRAL_ARGS = ToolForm("[TOOL_CALLS]name[ARGS]", _mistral, _mistral_args_rules)
DEEPSEEK_FENCED = ToolForm(
    "DeepSeek's marks and fences",
    _sectioned(*_DEEPSEEK, _DEEPSEEK_CALL),
    lambda tools, spell: _deepseek_rules(tools, spell, fenced=True),
)
DEEPSEEK = ToolForm(
    "DeepSeek's marks",
    _sectioned(*_DEEPSEEK, _DEEPSEEK_CALL),
    lambda tools, spell: _deepseek_rules(tools, spell, fenced=False),
)
KIMI = ToolForm("Kimi's marks", _sectioned(*_KIMI, _KIMI_CALL), _kimi_rules)
HARMONY = ToolForm("harmony", None, _harmony_rules)
FORMS = (TAGGED, GLM, XML, MISTRAL, MISTRAL_ARGS, DEEPSEEK, DEEPSEEK_FENCED, KIMI, HARMONY)

_BY_MARK = (
    ("<|channel|>", HARMONY),
    (_KIMI[0], KIMI),
    ("<arg_key>", GLM),
    ("<function=", XML),
    ("<tool_call>", TAGGED),
)
