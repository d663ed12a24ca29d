"""What a chat consists of: the system text and the messages; and its file. No terminal, no model."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.errors import ConmoeError, UsageError

KIND = "conmoe-edge chat"
SCHEMA_VERSION = 1
_LARGEST_FILE = 64 << 20


class Message(TypedDict):
    """One message as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(slots=True)
class Conversation:
    """The messages so far; ``system`` stands before them. A question without an answer is never
    kept. The first ``left_out`` messages are kept, and shown and saved, but no longer sent.
    """

    system: str = ""
    messages: list[Message] = field(default_factory=list)
    left_out: int = 0

    def asking(self, question: str) -> list[Message]:
        """Everything that goes to the model for ``question``; the conversation itself stays as it
        is.
        """
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        sent = self.messages[self.left_out :]
        return [*first, *sent, {"role": "user", "content": question}]

    def leave_out_a_turn(self) -> bool:
        """Send the oldest turn that is still sent no more; false where there is none."""
        if self.left_out >= len(self.messages):
            return False
        self.left_out += 2
        return True

    def add(self, question: str, answer: str) -> None:
        """Keep a turn."""
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": answer})

    def take_back(self) -> str | None:
        """Forget the last turn and return its question; ``None`` where there is none."""
        if len(self.messages) < 2:
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self.left_out = min(self.left_out, len(self.messages))
        return question

    def last_answer(self) -> str | None:
        """The text of the last answer; ``None`` before there is one."""
        return self.messages[-1]["content"] if self.messages else None

    def clear(self) -> None:
        """Forget the messages; the system text stays."""
        self.messages.clear()
        self.left_out = 0

    def save(self, path: Path, model: str) -> None:
        """Write the conversation, whole or not at all, readable by the user alone.

        Raises:
            UsageError: a file is there that is no saved chat.
            ConmoeError: the file cannot be written.
        """
        if path.exists() and not _is_chat(path):
            raise UsageError(
                f"{path} is there and is no saved chat.", "it was left alone", "another name"
            )
        value = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "model": model,
            "system": self.system,
            "messages": self.messages,
        }
        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".chat-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(value, file, ensure_ascii=False, indent=2)
                durable.fsync_file(Path(name))
                durable.replace(Path(name), path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConmoeError(
                f"{path} cannot be written.", error.strerror or str(error), "another name"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """A saved conversation.

        Raises:
            ConmoeError: the file cannot be read or is no saved chat.
        """
        fix = "a file that /save wrote"
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise ConmoeError(f"{path} is too large to be a chat.", "", fix)
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConmoeError(
                f"{path} cannot be read.", error.strerror or str(error), fix
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConmoeError(f"{path} is no saved chat.", "it is not JSON", fix) from error
        problem = _problem(value)
        if problem:
            raise ConmoeError(f"{path} is no saved chat.", problem, fix)
        messages: list[Message] = [
            {"role": m["role"], "content": m["content"]} for m in value["messages"]
        ]
        return cls(value["system"], messages)


def _is_chat(path: Path) -> bool:
    try:
        Conversation.load(path)
    except ConmoeError:
        return False
    return True


def _problem(value: Any) -> str:
    """What is wrong with a loaded value; empty where nothing is."""
    if not isinstance(value, dict) or value.get("kind") != KIND:
        return f"it does not say kind: {KIND!r}"
    if value.get("schema_version") != SCHEMA_VERSION:
        return f"its schema_version is {value.get('schema_version')!r}, known is {SCHEMA_VERSION}"
    messages = value.get("messages")
    if not isinstance(value.get("system"), str) or not isinstance(messages, list):
        return "its system or its messages are missing"
    if len(messages) % 2:
        return "it ends with a question"
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        if not isinstance(message, dict) or message.get("role") != role:
            return f"message {index + 1} should be the {role}'s"
        if not isinstance(message.get("content"), str):
            return f"message {index + 1} has no text"
    return ""
