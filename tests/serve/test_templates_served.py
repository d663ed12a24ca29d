"""Servers of a model with several chat templates, and of one with none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

import conmoe_edge
from conmoe_edge.cli.main import main
from tests.serve.conftest import NAME, serving

DEMO = Path(__file__).parents[2] / "conmoe_edge" / "data" / "demo"
SYSTEM: list[Any] = [{"role": "system", "content": "Be short."}]
QUESTION: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]
TURNS: list[Any] = [*QUESTION, {"role": "assistant", "content": "It is wide."}, *QUESTION]


def packed(folder: Path, templates: list[dict[str, str]] | None) -> Path:
    """The demo model, unchanged, with these templates and no other."""
    source, out = folder / "source", folder / "out"
    shutil.copytree(DEMO, source)
    (source / "chat_template.jinja").unlink()
    path = source / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
    if templates is not None:
        settings["chat_template"] = templates
    path.write_text(json.dumps(settings))
    conmoe_edge.fit(str(source), out, budget="900MB", device="cpu")
    return out


def tokens(client: openai.OpenAI, messages: list[Any]) -> int:
    reply = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)
    assert reply.usage is not None
    return reply.usage.prompt_tokens


def test_a_template_by_name(tmp_path: Path) -> None:
    own = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    bare = "{{ messages[-1].content }}"
    out = packed(tmp_path, [{"name": "long", "template": own}, {"name": "bare", "template": bare}])
    chat = ["chat", str(out), "--prompt", "Hello", "--max-tokens", "2", "--temperature", "0"]
    unnamed = CliRunner().invoke(main, chat)
    assert unnamed.exit_code == 2 and "they are called bare, long" in unnamed.stderr
    wrong = CliRunner().invoke(main, [*chat, "--template", "default"])
    assert wrong.exit_code == 2 and "the model has: bare, long" in wrong.stderr
    assert CliRunner().invoke(main, [*chat, "--template", "long"]).exit_code == 0
    with serving(out, "--template", "bare") as running:
        client = running.client()
        text = client.completions.create(
            model=NAME, prompt=QUESTION[0]["content"], max_tokens=1
        ).usage
        assert text is not None
        assert tokens(client, QUESTION) <= text.prompt_tokens


def test_no_template(tmp_path: Path) -> None:
    with serving(packed(tmp_path, None)) as running:
        client = running.client()
        alone = tokens(client, QUESTION)
        assert tokens(client, [*SYSTEM, *QUESTION]) > alone
        for messages in (TURNS, [*SYSTEM, *TURNS]):
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                tokens(client, messages)
