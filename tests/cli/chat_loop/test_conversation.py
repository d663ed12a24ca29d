"""The conversation, its settings and its file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conmoe_edge.cli.chat_loop.conversation import KIND, Conversation
from conmoe_edge.errors import ConmoeError, UsageError

TURNS = st.lists(st.tuples(st.text(), st.text()), max_size=4)


@given(system=st.text(), turns=TURNS)
def test_a_saved_chat_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, system: str, turns: list[tuple[str, str]]
) -> None:
    # A lone surrogate is no text that a file can hold; the terminal never gives one.
    texts = [system, *(text for turn in turns for text in turn)]
    if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
        return
    chat = Conversation(system)
    for question, answer in turns:
        chat.add(question, answer)
    path = tmp_path_factory.mktemp("chat") / "c.json"
    chat.save(path, "demo")
    assert Conversation.load(path) == chat


def test_only_the_user_can_read_a_saved_chat(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    Conversation().save(path, "demo")
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match="no saved chat"):
        Conversation().save(path, "demo")
    assert path.read_text(encoding="utf-8") == "years of work"


def test_an_older_save_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    Conversation("one").save(path, "demo")
    Conversation("two").save(path, "demo")
    assert Conversation.load(path).system == "two"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConmoeError, match="cannot be written"):
        Conversation().save(tmp_path / "no" / "c.json", "demo")


GOOD: dict[str, Any] = {
    "schema_version": 1,
    "kind": KIND,
    "system": "",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"schema_version": 2},
        {"system": 3},
        {"messages": "x"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 1}]},
        {"messages": [1, 2]},
    ],
)
def test_a_file_that_is_no_chat_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    Conversation.load(path)
    path.write_text(json.dumps({**GOOD, **change}), encoding="utf-8")
    with pytest.raises(ConmoeError, match="no saved chat"):
        Conversation.load(path)


@pytest.mark.parametrize("text", ["", "not json", "[" * 100_000, "[]", "3"])
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConmoeError):
        Conversation.load(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConmoeError):
        Conversation.load(path)


def test_asking_keeps_nothing_and_puts_the_system_text_first() -> None:
    chat = Conversation("be brief")
    chat.add("a", "b")
    assert [m["content"] for m in chat.asking("c")] == ["be brief", "a", "b", "c"]
    assert len(chat.messages) == 2
    assert chat.take_back() == "a"
    assert chat.take_back() is None
