"""Reads one message at a time from a person: history, several lines, pasted text. The only file
that knows prompt_toolkit.

Enter sends. Alt-Enter starts a new line, and so does Enter between a leading ``\"\"\"`` and the
closing one. Pasted lines are one message. Ctrl-C empties the line; at an empty one it raises
``KeyboardInterrupt``. Ctrl-D at an empty line: ``EOFError``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.base import Input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import Output, create_output

_FENCE = '"""'


def state_folder() -> Path:
    """Where the history lies: ``CONMOE_STATE_DIR``, else the user's state folder."""
    redirected = os.environ.get("CONMOE_STATE_DIR")
    return Path(redirected) if redirected else platformdirs.user_state_path("conmoe-edge")


def open_history(keep: bool) -> tuple[History, str]:
    """The history file, readable by the user alone, and a warning where it cannot be used (then:
    memory).
    """
    if not keep:
        return InMemoryHistory(), ""
    path = state_folder() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The mode of an existing file is not changed by opening it, so it is set as well.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError as error:
        return (
            InMemoryHistory(),
            f"no history: {path} cannot be written ({error.strerror or error})",
        )
    return FileHistory(str(path)), ""


def is_open(text: str) -> bool:
    """Whether a message that began with three quotes still waits for the closing ones."""
    stripped = text.strip()
    if not stripped.startswith(_FENCE):
        return False
    return len(stripped) < 2 * len(_FENCE) or not stripped.endswith(_FENCE)


def unfence(text: str) -> str:
    """The message without the quotes around it."""
    stripped = text.strip()
    if stripped.startswith(_FENCE) and not is_open(stripped):
        return stripped[len(_FENCE) : -len(_FENCE)].strip("\n")
    return stripped


def continuation(width: int, _line: int, wrapped: int) -> str:
    """What stands before a line of the message that is not its first: dots, or blanks where the terminal is too narrow
    for the line before.
    """
    return " " * width if wrapped else "." * (width - 1) + " "


class Reader:
    """The prompt. ``terminal_input`` and ``terminal_output`` replace the terminal in tests."""

    def __init__(
        self,
        commands: Sequence[str],
        history: History,
        terminal_input: Input | None = None,
        terminal_output: Output | None = None,
    ) -> None:
        completer = WordCompleter(list(commands), sentence=True)
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=completer,
            complete_while_typing=Condition(self._types_command),
            multiline=True,
            key_bindings=_bindings(),
            prompt_continuation=continuation,
            reserve_space_for_menu=4,
            input=terminal_input,
            # The answer goes to stdout; where that is a file, the prompt still shows on the
            # terminal.
            output=terminal_output or create_output(always_prefer_tty=True),
        )

    def _types_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")

    def read(self, default: str = "") -> str:
        """The next message, without the quotes of a multi-line one; may be empty. ``default`` stands there already."""
        return unfence(self._session.prompt(HTML("<b>&gt;</b> "), default=default))


def _bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion:
            buffer.complete_state = None
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
