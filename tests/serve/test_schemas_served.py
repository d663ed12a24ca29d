"""Answers held to a schema, asked by the real client of a model that knows nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pydantic
import pytest

from tests.serve.conftest import NAME

QUESTION: list[Any] = [{"role": "user", "content": "Which river is it, and how long?"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 120}


class River(pydantic.BaseModel):
    kind: str = pydantic.Field(pattern="^[a-z]{1,12}$")
    kilometres: int = pydantic.Field(ge=0, le=9999)
    salty: bool


def test_pydantic_models_come_back_filled(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(messages=QUESTION, response_format=River, **GREEDY)
    text, river = reply.choices[0].message.content, reply.choices[0].message.parsed
    assert text is not None and "\n" not in text and "  " not in text
    assert isinstance(river, River) and reply.choices[0].finish_reason == "stop"
    again = client.chat.completions.parse(messages=QUESTION, response_format=River, **GREEDY)
    assert again.choices[0].message.parsed == river


def test_any_object(client: openai.OpenAI) -> None:
    some = {"response_format": {"type": "json_object"}, "max_tokens": 300}
    reply = client.chat.completions.create(messages=QUESTION, **{**GREEDY, **some})
    choice = reply.choices[0]
    text = choice.message.content
    assert text is not None and text.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_company_changes_no_schema(client: openai.OpenAI) -> None:
    """Answers with and without schemas share steps, and come out as alone."""
    schemas: list[Any] = [
        None,
        *(
            {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
            for schema in (
                {"enum": ["river", "sea"]},
                {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 5},
            )
        ),
    ]

    def ask(schema: Any) -> str | None:
        wish = {} if schema is None else {"response_format": schema}
        reply = client.chat.completions.create(messages=QUESTION, **{**GREEDY, **wish})
        return reply.choices[0].message.content

    alone = [ask(schema) for schema in schemas]
    assert json.loads(alone[1] or "") in ("river", "sea")
    assert 3 <= len(json.loads(alone[2] or "")) <= 5
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, schemas * 2)) == alone * 2


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_a_schema_that_cannot_be_enforced(client: openai.OpenAI, schema: Any, text: str) -> None:
    wish: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=text) as caught:
        client.chat.completions.create(messages=QUESTION, response_format=wish, **GREEDY)
    assert "cannot be enforced" in caught.value.message
