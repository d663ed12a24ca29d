"""How the answers of one model are to be read: where its reasoning and its calls stand, by its chat template.

Memory: none to speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from conmoe_edge.offload.generation.answer_parts import (
    MarkedReader,
    PartReader,
    PlainReader,
    ReasoningMarks,
)
from conmoe_edge.offload.generation.harmony_parts import HarmonyReader
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.thinking import ThinkingMarks
from conmoe_edge.offload.generation.tool_forms import ToolForm, Tools

_REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)
_TAIL = 16
_HARMONY_MARKS = (
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<|start|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Of one answer.

    Attributes:
        template: source of the chat template; empty where there is none.
        reasoning: where reasoning stands; ``None`` where the template knows none.
        thinking: the same in tokens, where its marks are tokens.
        calls: the form of calls; ``None`` where no tool is offered.
        generic: whether ``calls`` are asked for in our own words, since the template knows no tools.
        shown: control tokens that are marks, and so have to stay in the text.
    """

    template: str
    reasoning: ReasoningMarks | None = None
    thinking: ThinkingMarks | None = None
    calls: ToolForm | None = None
    generic: bool = False
    shown: frozenset[int] = frozenset()

    def settings(self, given: SamplingSettings) -> SamplingSettings:
        """``given``, with what this form needs to be read."""
        thinking = self.thinking if given.thinking is None else given.thinking
        return replace(given, thinking=thinking, shown=self.shown)

    def reader(self, tools: Tools = ()) -> PartReader:
        """What takes one answer apart."""
        if _is_harmony(self.template):
            return HarmonyReader()
        marks = None if self.calls is None or self.calls.marks is None else self.calls.marks(tools)
        if marks is None and self.reasoning is None:
            return PlainReader()
        return MarkedReader(self.reasoning, marks)


def answer_form(
    tokenizer: Any,
    template: str,
    prompt: Sequence[int],
    calls: ToolForm | None = None,
    *,
    generic: bool = False,
) -> AnswerForm:
    """Of the answer to ``prompt``, in tokens, which a chat template wrote."""
    marks = next((pair for pair in _REASONING if pair[1] in template), None)
    special = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    if _is_harmony(template):
        shown = frozenset(special[mark] for mark in _HARMONY_MARKS if mark in special)
        return AnswerForm(template, calls=calls, generic=generic, shown=shown)
    reasoning, thinking = None, None
    if marks is not None:
        tail = tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False)
        reasoning = ReasoningMarks(*marks, started=tail.rstrip().endswith(marks[0]))
        begin, end = (_token(tokenizer, mark) for mark in marks)
        if end is not None:
            over = tail.rstrip().endswith(
                marks[1]
            )  # the template has ended it: there is to be none
            thinking = ThinkingMarks(None if over else begin, end, reasoning.started)
    texts = [*(marks or ()), *([] if calls is None or generic else _call_marks(template, special))]
    shown = frozenset(special[text] for text in texts if text in special)
    return AnswerForm(template, reasoning, thinking, calls, generic, shown)


def _is_harmony(template: str) -> bool:
    return all(mark in template for mark in ("<|channel|>", "<|message|>"))


def _call_marks(template: str, special: dict[str, int]) -> list[str]:
    """Control tokens about tools that the template writes."""
    about = ("tool", "TOOL", "ARGS", "CALL_ID")
    return [text for text in special if text in template and any(one in text for one in about)]


def _token(tokenizer: Any, text: str) -> int | None:
    """The token that is ``text``; ``None`` where there is none."""
    known = tokenizer.get_added_vocab()
    return known.get(text)
