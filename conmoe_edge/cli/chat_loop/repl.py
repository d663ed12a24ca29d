"""The conversation loop: read a message, answer it or obey its command, until the user leaves.

Knows neither the terminal (``prompt_input.Reader`` or anything with ``read``) nor torch (``ChatSession``
or anything with its methods), so that tests drive it with a list of lines.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from conmoe_edge.cli.chat_loop.chat_stats import (
    cache_rows,
    context_line,
    footer,
    read_stats,
    stats_rows,
)
from conmoe_edge.cli.chat_loop.clipboard import copy
from conmoe_edge.cli.chat_loop.conversation import Conversation
from conmoe_edge.cli.chat_loop.make_room import OnFull, make_room
from conmoe_edge.cli.chat_loop.markdown_signs import is_markdown
from conmoe_edge.cli.chat_loop.set_command import SETTINGS, setting_rows, with_setting
from conmoe_edge.cli.chat_loop.silent_keys import silent_keys
from conmoe_edge.cli.chat_loop.turn import Turn, run_turn
from conmoe_edge.cli.chat_loop.wrapped_stream import WrappedStream
from conmoe_edge.cli.ui.error_text import describe
from conmoe_edge.cli.ui.text import counted, printable, without_controls
from conmoe_edge.cli.views.plan_views import table_view
from conmoe_edge.errors import ConmoeError, ContextFull, UsageError
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.offload.generation.session import ChatSession

_SHOWN = 20
"""Messages of a loaded conversation that are shown."""
_SHORTEN = "a shorter message; chat --context N keeps room for more"
_MAKE_ROOM = "/clear forgets the conversation; /save FILE keeps it first"
WELCOME = "Type a message. /help lists the commands, Ctrl-D leaves."


class MessageReader(Protocol):
    """Where messages come from."""

    def read(self, default: str = "") -> str:
        """The next message, changed from ``default``; raises ``EOFError`` at the end and ``KeyboardInterrupt`` on
        Ctrl-C at an empty line.
        """
        ...


class Command(NamedTuple):
    """A ``/command``: how it is written, what it does, and the method that does it."""

    usage: str
    about: str
    run: Callable[[Repl, str], None]


class Leave(Exception):
    """The user is done."""


class Repl:
    """One chat. ``name`` is the package's, for the files that ``/save`` writes. ``on_full``: what becomes of a
    conversation that its context cannot hold. ``markdown``: whether answers are shown as what their Markdown means.
    """

    def __init__(
        self,
        session: ChatSession,
        output: Output,
        *,
        name: str,
        conversation: Conversation | None = None,
        sampling: SamplingSettings | None = None,
        on_full: OnFull = "drop",
        markdown: bool = True,
    ) -> None:
        self.session = session
        self.output = output
        self.name = name
        self.conversation = conversation or Conversation()
        self.sampling = sampling or SamplingSettings()
        self.on_full = on_full
        self.markdown = markdown
        self._draft = ""  # what the next prompt begins with

    def run(self, reader: MessageReader) -> None:
        """Until the user leaves. Errors on purpose are shown; others are raised."""
        leaving = False
        while True:
            try:
                draft, self._draft = self._draft, ""
                text = reader.read(draft)
            except EOFError:
                return
            except KeyboardInterrupt:
                if leaving:
                    return
                leaving = True
                self.output.note("Ctrl-C again leaves, and so do Ctrl-D and /bye.")
                continue
            leaving = False
            try:
                self.handle(text)
            except Leave:
                return
            except ContextFull as error:
                # The way out that the error names is for programs; here it is a command.
                fix = _MAKE_ROOM if self.conversation.messages else _SHORTEN
                self.output.error(replace(describe(error), fix=fix))
            except ConmoeError as error:
                self.output.error(describe(error))
            except KeyboardInterrupt:
                self.output.note("\nStopped; the question was not kept.")

    def handle(self, text: str) -> None:
        """One message or command."""
        if not text.strip():
            return
        if text.startswith("/"):
            word, _, rest = text.partition(" ")
            if word[1:].replace("-", "_") in SETTINGS:
                self.set(f"{word[1:]} {rest}")
                return
            self._command(word).run(self, rest.strip())
        else:
            self.ask(text.strip())

    def ask(self, question: str) -> None:
        """Answer, show the footer, keep the turn.

        Raises:
            ContextFull: nothing was kept; the conversation is as it was.
        """
        if self.on_full == "drop":
            self._make_room(question)
        turn = self._answered(question)
        if turn.text:
            self.conversation.add(question, turn.text)
        if turn.stopped:
            self.output.note("Stopped." if turn.text else "Stopped; the question was not kept.")
        stats = read_stats(self.session)
        if stats.finish == "length":
            self.output.note(f"Cut at max_tokens; /set max_tokens {2 * stats.tokens} allows more.")
        self.output.note(footer(stats))
        self.output.note()
        if turn.full is not None:
            raise turn.full

    def _make_room(self, question: str) -> None:
        """Say which messages are no longer sent."""
        left_out = make_room(self.session, self.conversation, question, self.sampling.max_tokens)
        if left_out:
            kept = "the system text and " if self.conversation.system else ""
            rest = len(self.conversation.messages) - self.conversation.left_out
            self.output.note(
                f"The context is full: the oldest {counted(self.conversation.left_out, 'message')} are no longer sent, "
                f"{kept}{counted(rest, 'message')} before yours are. With --on-full stop an error says so instead."
            )

    def _answered(self, question: str) -> Turn:
        """Stream the answer; on a terminal between words, and once more where it is Markdown."""
        asked = self.conversation.asking(question)
        if not self.output.stdout_is_terminal:
            turn = run_turn(self.session, asked, self.sampling, self.output.stream)
            self.output.stream("" if turn.text.endswith("\n") else "\n")
            return turn
        stream = WrappedStream(self.output.stream, lambda: self.output.stdout_size[0])
        with silent_keys():
            turn = run_turn(
                self.session,
                asked,
                self.sampling,
                lambda piece: stream.add(without_controls(piece)),
            )
        stream.end()
        seen = stream.rows < self.output.stdout_size[1] and not stream.resized
        if self.markdown and seen and is_markdown(stream.text):
            self.output.replace_by_markdown(stream.text, stream.rows)
        return turn

    def _command(self, word: str) -> Command:
        command = COMMANDS.get(_SHORT.get(word, word))
        if command is not None:
            return command
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        raise UsageError(
            f"There is no command {word}.",
            f"perhaps {near[0]}" if near else "",
            "/help; a message that begins with / needs a space before it",
        )

    def help(self, _rest: str) -> None:
        """Every command."""
        rows = [(command.usage, command.about) for command in COMMANDS.values()]
        rows += [
            ("Alt-Enter", 'a new line in the message; so does Enter after a leading """'),
            ("Ctrl-C", "stop the answer; at an empty line, twice: leave"),
        ]
        self.output.note(table_view(("", ""), rows))

    def stats(self, _rest: str) -> None:
        """The last answer in numbers."""
        self.output.note(table_view(("", ""), stats_rows(read_stats(self.session))))

    def cache(self, _rest: str) -> None:
        """Where the prototypes are."""
        self.output.note(table_view(("", ""), cache_rows(read_stats(self.session))))

    def system(self, rest: str) -> None:
        """Show, set or remove the system text."""
        if not rest:
            self.output.note(
                printable(self.conversation.system) or "No system text. /system TEXT sets one."
            )
            return
        self.conversation.system = "" if rest == "none" else rest
        self.output.note(
            "Removed." if rest == "none" else "Set; it holds from the next message on."
        )

    def set(self, rest: str) -> None:
        """Show the sampling settings or change one."""
        name, _, values = rest.replace("=", " ", 1).partition(" ")
        if not name:
            self.output.note(table_view(("setting", "value"), setting_rows(self.sampling)))
            return
        try:
            words = shlex.split(values)
        except ValueError:
            words = values.split()
        if not words:
            raise UsageError("/set takes a name and a value.", "", "/set temperature 0.6")
        self.sampling = with_setting(self.sampling, name, words)
        self.output.note(printable(f"{name} is {' '.join(words)}."))

    def save(self, rest: str) -> None:
        """Write the conversation to a file."""
        path = _path(rest, "/save FILE")
        self.conversation.save(path, self.name)
        self.output.note(f"Saved {self._length()} to {printable(str(path))}.")

    def load(self, rest: str) -> None:
        """Go on with a saved conversation."""
        self.conversation = Conversation.load(_path(rest, "/load FILE"))
        self.session.forget()
        shown = self.conversation.messages[-_SHOWN:]
        earlier = len(self.conversation.messages) - len(shown)
        if earlier:
            self.output.note(f"({counted(earlier, 'earlier message')})\n")
        for message in shown:
            mark = "> " if message["role"] == "user" else ""
            self.output.note(f"{mark}{without_controls(message['content'])}\n")
        self.output.note(f"Loaded {self._length()}.")

    def retry(self, _rest: str) -> None:
        """Take the last answer back and ask again."""
        self._again(lambda question: question)

    def edit(self, rest: str) -> None:
        """Take the last question and its answer back, and ask it changed."""
        if rest:
            self._again(lambda _question: rest)
            return
        question = self.conversation.take_back()
        if question is None:
            raise UsageError("There is no question to change.", "", "type a message first")
        self._draft = question
        self.output.note("The last question and its answer are taken back; send it changed.")

    def copy(self, _rest: str) -> None:
        """The last answer to the clipboard."""
        answer = self.conversation.last_answer()
        if answer is None:
            raise UsageError("There is no answer to copy.", "", "type a message first")
        self.output.note(f"Copied by {copy(answer, self.output.stream)}.")

    def _again(self, changed: Callable[[str], str]) -> None:
        """Ask the last question again, as ``changed`` makes it."""
        before, left_out = list(self.conversation.messages), self.conversation.left_out
        question = self.conversation.take_back()
        if question is None:
            raise UsageError("There is no answer to take back.", "", "type a message first")
        try:
            self.ask(changed(question))
        finally:
            # Nothing came of it: the answer that was there is better than none.
            if not self.conversation.messages or len(self.conversation.messages) < len(before):
                self.conversation.messages[:] = before
                self.conversation.left_out = left_out

    def clear(self, _rest: str) -> None:
        """Forget the conversation."""
        self.conversation.clear()
        self.session.forget()
        self.output.note(
            "Forgotten; the system text stays." if self.conversation.system else "Forgotten."
        )

    def context(self, _rest: str) -> None:
        """How full the context is."""
        self.output.note(context_line(read_stats(self.session)))

    def bye(self, _rest: str) -> None:
        """Leave."""
        raise Leave

    def _length(self) -> str:
        return counted(len(self.conversation.messages), "message")


def _path(text: str, usage: str) -> Path:
    """The one file name in ``text``, quotes and ``~`` honoured."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if len(words) != 1:
        raise UsageError(f"{usage.split()[0]} takes one file name.", "", usage)
    return Path(words[0]).expanduser()


COMMANDS: dict[str, Command] = {
    "/help": Command("/help", "this list", Repl.help),
    "/stats": Command("/stats", "the last answer in numbers", Repl.stats),
    "/cache": Command(
        "/cache", "where the prototypes are and how often they were there", Repl.cache
    ),
    "/context": Command("/context", "how full the context is", Repl.context),
    "/system": Command("/system [TEXT|none]", "show, set or remove the system text", Repl.system),
    "/set": Command(
        "/set [NAME VALUE]", f"{', '.join(SETTINGS)}; /NAME VALUE does the same", Repl.set
    ),
    "/save": Command("/save FILE", "write the conversation to a file", Repl.save),
    "/load": Command("/load FILE", "show a saved one, and go on with it", Repl.load),
    "/retry": Command("/retry", "take the last answer back and ask again", Repl.retry),
    "/edit": Command("/edit [TEXT]", "take the last question back too, and change it", Repl.edit),
    "/copy": Command("/copy", "the last answer to the clipboard", Repl.copy),
    "/clear": Command("/clear", "forget the conversation", Repl.clear),
    "/bye": Command("/bye", "leave", Repl.bye),
}
_SHORT = {"/?": "/help", "/exit": "/bye", "/quit": "/bye", "/q": "/bye"}
