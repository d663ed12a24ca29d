"""Conversations as agents send them, given to templates that know one system message and turns that alternate."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.chat_prompt import chat_prompt
from conmoe_edge.offload.generation.chat_template import shared
from conmoe_edge.offload.generation.message_order import in_order
from tests import chat_templates as templates
from tests.small_tokenizers import make

FIRST_ONLY = """\
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('Only the first.') }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
"""
DROPS_LATER = FIRST_ONLY.replace(
    "{{ raise_exception('Only the first.') }}{% endif %}", "{% else %}"
).replace("\n{%- endfor %}", "{%- endif %}\n{%- endfor %}")
OF_AGENT = ["system:A", "system:B", "user:C", "user:D", "system:E", "assistant:F", "user:G"]
"""In the manner of Codex, which opens so, and of Claude Code, which sends system messages later."""


def turns(lines: list[str]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": text} for role, _, text in (line.partition(":") for line in lines)
    ]


def lines(messages: list[dict[str, Any]]) -> list[str]:
    return [f"{one['role']}:{one['content']}" for one in messages]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("", ["system:A\n\nB", *OF_AGENT[2:]]),
        (templates.CHATML, ["system:A\n\nB", *OF_AGENT[2:]]),
        (templates.THINKING, ["system:A\n\nB", *OF_AGENT[2:]]),
        (templates.BARE, ["system:A\n\nB", *OF_AGENT[2:]]),
        (FIRST_ONLY, ["system:A\n\nB", "user:C", "user:D", "user:E", "assistant:F", "user:G"]),
        (DROPS_LATER, ["system:A\n\nB", "user:C", "user:D", "user:E", "assistant:F", "user:G"]),
        (templates.INSTRUCTIONS, ["system:A\n\nB", "user:C\n\nD\n\nE", "assistant:F", "user:G"]),
        (templates.TURNS, ["system:A\n\nB", "user:C\n\nD\n\nE", "assistant:F", "user:G"]),
    ],
)
def test_every_template_gets_what_it_takes(template: str, expected: list[str]) -> None:
    given = turns(OF_AGENT)
    assert lines(in_order(given, template, {})) == expected
    assert given == turns(OF_AGENT)  # nobody else's messages are changed


@pytest.mark.parametrize("name", templates.ALL)
def test_a_plain_conversation_stays_as_it_is(name: str) -> None:
    given = turns(["system:A", "user:B", "assistant:C", "user:D"])
    assert in_order(given, templates.ALL[name], {"bos_token": "<s>", "eos_token": "</s>"}) == given


@pytest.mark.parametrize("template", [FIRST_ONLY, DROPS_LATER, templates.INSTRUCTIONS])
def test_no_message_is_lost(template: str) -> None:
    tokenizer = make("byte-bpe")
    tokenizer.chat_template = template
    words = ("river", "stone", "cloud", "grass", "night", "ocean", "bread")
    given = [{**one, "content": word} for one, word in zip(turns(OF_AGENT), words, strict=True)]
    made = chat_prompt(tokenizer, given)
    text = tokenizer.decode(made.tokens)
    assert made.reordered and all(word in text for word in words), text
    plain = chat_prompt(tokenizer, given[2:3])
    assert not plain.reordered


def test_a_template_that_could_not_be_asked_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A busy machine must not decide for good how a model is talked to."""
    template = FIRST_ONLY + "{# asked on a busy machine #}"

    def busy(*_: Any) -> str:
        raise UsageError("The model's chat template does not come to an end.", "", "")

    with monkeypatch.context() as patch:
        patch.setattr(shared, "taken", busy)
        with pytest.raises(UsageError, match="come to an end"):
            in_order(turns(OF_AGENT), template, {})
    assert lines(in_order(turns(OF_AGENT), template, {}))[3] == "user:E"
