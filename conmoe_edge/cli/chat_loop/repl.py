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
from conmoe_edge.cli.chat_loop.conversation import Conversation
from conmoe_edge.cli.chat_loop.set_command import setting_rows, with_setting
from conmoe_edge.cli.chat_loop.turn import run_turn
from conmoe_edge.cli.ui.error_text import describe
from conmoe_edge.cli.ui.text import counted, printable, without_controls
from conmoe_edge.cli.views.plan_views import table_view
from conmoe_edge.errors import ConmoeError, ContextFull, UsageError
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings

if TYPE_CHECKING:
    from conmoe_edge.cli.ui.output import Output
    from conmoe_edge.offload.generation.session import ChatSession

_SHORTEN = "a shorter message; chat --context N keeps room for more"
_MAKE_ROOM = "/clear forgets the conversation; /save FILE keeps it first"
WELCOME = "Type a message. /help lists the commands, Ctrl-D leaves."


class MessageReader(Protocol):
    """Where messages come from."""

    def read(self) -> str:
        """The next message; raises ``EOFError`` at the end and ``KeyboardInterrupt`` on Ctrl-C at
        an empty line.
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
    """One chat. ``name`` is the package's, for the files that ``/save`` writes."""

    def __init__(
        self,
        session: ChatSession,
        output: Output,
        *,
        name: str,
        conversation: Conversation | None = None,
        sampling: SamplingSettings | None = None,
    ) -> None:
        self.session = session
        self.output = output
        self.name = name
        self.conversation = conversation or Conversation()
        self.sampling = sampling or SamplingSettings()

    def run(self, reader: MessageReader) -> None:
        """Until the user leaves. Errors on purpose are shown; others are raised."""
        leaving = False
        while True:
            try:
                text = reader.read()
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
            self._command(word).run(self, rest.strip())
        else:
            self.ask(text.strip())

    def ask(self, question: str) -> None:
        """Answer, show the footer, keep the turn.

        Raises:
            ContextFull: nothing was kept; the conversation is as it was.
        """
        clean = without_controls if self.output.stdout_is_terminal else str
        turn = run_turn(
            self.session,
            self.conversation.asking(question),
            self.sampling,
            lambda piece: self.output.stream(clean(piece)),
        )
        self.output.stream("" if turn.text.endswith("\n") else "\n")
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
        words = rest.replace("=", " ").split()
        if not words:
            self.output.note(table_view(("setting", "value"), setting_rows(self.sampling)))
            return
        if len(words) != 2:
            raise UsageError("/set takes a name and a value.", "", "/set temperature 0.6")
        self.sampling = with_setting(self.sampling, *words)
        self.output.note(f"{words[0]} is {words[1]}.")

    def save(self, rest: str) -> None:
        """Write the conversation to a file."""
        path = _path(rest, "/save FILE")
        self.conversation.save(path, self.name)
        self.output.note(f"Saved {self._length()} to {printable(str(path))}.")

    def load(self, rest: str) -> None:
        """Go on with a saved conversation."""
        self.conversation = Conversation.load(_path(rest, "/load FILE"))
        self.session.forget()
        self.output.note(f"Loaded {self._length()}.")

    def retry(self, _rest: str) -> None:
        """Take the last answer back and ask again."""
        before = list(self.conversation.messages)
        question = self.conversation.take_back()
        if question is None:
            raise UsageError("There is no answer to take back.", "", "type a message first")
        try:
            self.ask(question)
        finally:
            # Nothing came of it: the answer that was there is better than none.
            if not self.conversation.messages or len(self.conversation.messages) < len(before):
                self.conversation.messages[:] = before

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
    "/set": Command("/set [NAME VALUE]", "temperature, top_p, max_tokens, seed", Repl.set),
    "/save": Command("/save FILE", "write the conversation to a file", Repl.save),
    "/load": Command("/load FILE", "go on with a saved one", Repl.load),
    "/retry": Command("/retry", "take the last answer back and ask again", Repl.retry),
    "/clear": Command("/clear", "forget the conversation", Repl.clear),
    "/bye": Command("/bye", "leave", Repl.bye),
}
_SHORT = {"/?": "/help", "/exit": "/bye", "/quit": "/bye", "/q": "/bye"}
