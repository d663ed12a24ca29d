"""Texts of answers taken apart, whole and letter by letter: every form of calls, reasoning, and what is neither."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conmoe_edge.offload.generation.answer_parts import (
    Called,
    MarkedReader,
    Part,
    PartReader,
    PlainReader,
    ReasoningMarks,
    Said,
    Thought,
    joined,
)
from conmoe_edge.offload.generation.harmony_parts import HarmonyReader
from conmoe_edge.offload.generation.tool_forms import (
    DEEPSEEK,
    DEEPSEEK_FENCED,
    FORMS,
    GLM,
    HARMONY,
    KIMI,
    MISTRAL,
    MISTRAL_ARGS,
    TAGGED,
    XML,
    ToolForm,
    form_of,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
]
CALL = Called("weather", '{"place": "Bern", "days": 3}')
THINK = ReasoningMarks("<think>", "</think>")
SEP = "<｜tool▁sep｜>"


def read(make: Any, text: str, size: int) -> list[Part]:
    reader: PartReader = make()
    parts: list[Part] = []
    for start in range(0, len(text), size):
        parts += reader.add(text[start : start + size])
    return joined([*parts, *reader.finish()])


def both(make: Any, text: str) -> list[Part]:
    """The parts; the same however the text is cut."""
    whole = read(make, text, max(1, len(text)))
    for size in (1, 2, 3, 7):
        assert read(make, text, size) == whole
    return whole


def reader_of(form: ToolForm, reasoning: ReasoningMarks | None = None) -> Any:
    marks = None if form.marks is None else form.marks(TOOLS)
    return HarmonyReader if form is HARMONY else lambda: MarkedReader(reasoning, marks)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (TAGGED, '<tool_call>\n{"name": "weather", "arguments": {"place": "Bern", "days": 3}}\n</tool_call>'),
        (TAGGED, '<tool_call>{"name": "weather", "parameters": {"place": "Bern", "days": 3}}</tool_call>'),
        (
            GLM,
            "<tool_call>weather\n<arg_key>place</arg_key>\n<arg_value>Bern</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        ),
        (
            XML,
            "<tool_call>\n<function=weather>\n<parameter=place>\nBern\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        ),
        (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"place": "Bern", "days": 3}}]'),
        (MISTRAL_ARGS, '[TOOL_CALLS]weather[ARGS]{"place": "Bern", "days": 3}'),
        (
            DEEPSEEK_FENCED,
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function{SEP}weather\n```json\n"
            '{"place": "Bern", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ),
        (
            DEEPSEEK,
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather{SEP}"
            '{"place": "Bern", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ),
        (
            KIMI,
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
            '{"place": "Bern", "days": 3}<|tool_call_end|><|tool_calls_section_end|>',
        ),
        (
            HARMONY,
            "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
            '{"place": "Bern", "days": 3}<|call|>',
        ),
    ],
)  # fmt: skip
def test_calls_of_every_form(form: ToolForm, text: str) -> None:
    make = reader_of(form, THINK if form.marks is not None else None)
    assert both(make, text) == [CALL]
    if form is HARMONY:
        head = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        spoken = f"{head}<|channel|>commentary<|message|>Look.<|end|><|start|>assistant{text}"
        assert both(make, spoken) == [Thought("Hm."), Said("Look."), CALL]
        return
    assert both(make, f"Let me look.\n\n{text}") == [Said("Let me look."), CALL]
    assert both(make, f"<think>\nHm.\n</think>\n\n{text}\n") == [Thought("Hm."), CALL]


@pytest.mark.parametrize(
    ("form", "text", "count"),
    [
        (TAGGED, '<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>', 2),
        (TAGGED, '<tool_call>[{"name": "a"}, {"name": "b"}]</tool_call>', 2),
        (MISTRAL, '[TOOL_CALLS][{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]', 2),
        (MISTRAL_ARGS, "[TOOL_CALLS]a[ARGS]{}[TOOL_CALLS]b[ARGS]{}", 2),
        (
            DEEPSEEK,
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a{SEP}{{}}<｜tool▁call▁end｜>"
            f"<｜tool▁call▁begin｜>b{SEP}{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            2,
        ),
    ],
)  # fmt: skip
def test_several_calls(form: ToolForm, text: str, count: int) -> None:
    parts = both(reader_of(form), text)
    assert parts == [Called(name, "{}") for name in "ab"[:count]]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "weather", "arguments": {"place": "Be',  # cut off
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": 5}</tool_call> and more',
        "<tool_call>no call at all</tool_call>",
        '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
        f"<tool_call>{'[' * 20000}</tool_call>",
        "a < b, <tool_cal and <b>bold</b>\n\n",
        "  blanks at both ends \n ",
        "",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    sizes = (len(text) or 1, 1) if len(text) < 1000 else (len(text), 777)
    for size in sizes:
        parts = read(reader_of(TAGGED, THINK), text, size)
        assert parts == ([Said(text)] if text else [])


@pytest.mark.parametrize(
    ("started", "text", "expected"),
    [
        (False, "<think>\nA b.\n</think>\n\nYes. ", [Thought("A b."), Said("Yes. ")]),
        (False, "\n<think></think>Yes", [Said("Yes")]),
        (False, "Yes <think> no </think>", [Said("Yes <think> no </think>")]),
        (False, "<think>cut", [Thought("cut")]),
        (True, "A\n\nb</think>\nYes", [Thought("A\n\nb"), Said("Yes")]),
        (True, "no end", [Thought("no end")]),
        (False, " plain </think> text", [Said(" plain </think> text")]),
    ],
)
def test_reasoning(started: bool, text: str, expected: list[Part]) -> None:
    marks = ReasoningMarks("<think>", "</think>", started)
    assert both(lambda: MarkedReader(marks), text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            [Thought("Hm."), Said("Yes.")],
        ),
        ("<|channel|>final<|message|>Yes.<|return|>", [Said("Yes.")]),
        ("no marks at all", [Said("no marks at all")]),
        ("", []),
        (
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": ",
            [Said('{"a": ')],
        ),
        ("<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}", [Called("f", "{}")]),
    ],
)  # fmt: skip
def test_harmony(text: str, expected: list[Part]) -> None:
    assert both(HarmonyReader, text) == expected


@pytest.mark.parametrize("form", [TAGGED, HARMONY], ids=lambda form: form.name)
def test_a_call_nested_beyond_reading_stays_text(form: ToolForm) -> None:
    deep = '{"a":' * 100_000
    if form is HARMONY:
        reader: PartReader = HarmonyReader()
        text = f"<|channel|>commentary to=functions.x <|constrain|>json<|message|>{deep}<|call|>"
    else:
        assert form.marks is not None
        reader = MarkedReader(None, form.marks(TOOLS))
        text = f"<tool_call>{deep}</tool_call>"
    parts = [*reader.add(text), *reader.finish()]
    assert parts and all(isinstance(one, Said) for one in parts)


def test_plain_text_is_left_alone() -> None:
    assert read(PlainReader, " a <think> b ", 1) == [Said(" a <think> b ")]


def test_numbers_are_numbers_and_texts_texts() -> None:
    """In tags everything is text; the schema says what was meant."""
    text = (
        "<tool_call>weather\n<arg_key>place</arg_key>\n<arg_value>12</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>12</arg_value>\n"
        "<arg_key>more</arg_key>\n<arg_value>[1, {}]</arg_value>\n</tool_call>"
    )
    (call,) = both(reader_of(GLM), text)
    assert isinstance(call, Called)
    assert json.loads(call.arguments) == {"place": "12", "days": 12, "more": [1, {}]}


def test_forms_are_known_by_the_marks_in_a_template() -> None:
    found = {
        form_of(text)
        for text in (
            "<tool_call> {{ x }}",
            "<tool_call> <arg_key>",
            "<tool_call> <function=",
            "[TOOL_CALLS]",
            "[TOOL_CALLS] [ARGS]",
            "<｜tool▁calls▁begin｜> ```json",
            "<｜tool▁calls▁begin｜>",
            "<|tool_calls_section_begin|>",
            "<|channel|> <|message|>",
        )
    }
    assert found == set(FORMS)
    assert form_of("{{ messages }}") is None
