"""Where text goes: results to stdout, everything else to stderr. The only file that owns rich
consoles.

Modes: human, ``--json`` (exactly one value on stdout, nothing else there) and ``--quiet`` (stderr
keeps warnings and errors). On a console without UTF-8 every symbol is written in ASCII; off a
terminal lines are never folded.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.text import Text

from conmoe_edge.cli.ui.error_text import ErrorText
from conmoe_edge.cli.ui.json_stdout import of_this_run
from conmoe_edge.cli.ui.text import printable, to_encoding

_UNFOLDED = 1000


class Output:
    """One command's output."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._json = of_this_run()  # held: a server says its value from another thread
        self._stdout = _console(sys.stdout)
        self._stderr = _console(sys.stderr)

    @property
    def stderr_is_terminal(self) -> bool:
        """Whether a bar can move and colours show there."""
        return self._stderr.is_terminal

    @property
    def stdout_is_terminal(self) -> bool:
        """Whether a person reads the result as it comes."""
        return self._stdout.is_terminal

    @property
    def stderr_console(self) -> Console:
        """For the progress bar, which draws by itself."""
        return self._stderr

    def result(self, renderable: RenderableType) -> None:
        """What the command is for; nothing in JSON mode, where ``value`` says it."""
        if not self.as_json:
            _print(self._stdout, renderable)

    def value(self, payload: dict[str, Any]) -> None:
        """The one JSON value; nothing in the other modes. Said once in a run of the program."""
        if self.as_json:
            self._json.write(payload)

    def stream(self, text: str) -> None:
        """A piece of an answer, at once and as it is."""
        self._stdout.file.write(text)
        self._stdout.file.flush()

    @property
    def stdout_size(self) -> tuple[int, int]:
        """Cells in a line and lines, of the terminal now."""
        size = self._stdout.size
        return size.width, size.height

    def replace_by_markdown(self, text: str, rows: int) -> None:
        """On a terminal: the last ``rows`` lines again, as what their Markdown means. Links stay text."""
        from rich.markdown import Markdown

        self._stdout.file.write(f"\x1b[{rows}A\r\x1b[J")
        self._stdout.print(Markdown(text, code_theme="ansi_dark", hyperlinks=False))

    def note(self, renderable: RenderableType = "") -> None:
        """What goes on beside the result: a plan, progress, a hint."""
        if not self.quiet:
            _print(self._stderr, renderable)

    def warning(self, message: str) -> None:
        """Something to look at; shown under ``--quiet`` as well."""
        self._stderr.print(Text.assemble(("warning: ", "bold yellow"), printable(message)))

    def error(self, error: ErrorText) -> None:
        """At most three lines: error, why, fix. In JSON mode the value with ``error``, on stdout, unless the
        command's own value stands there already.
        """
        if self.as_json and self._json.write({"error": error.to_json()}):
            return
        if error.type == "Interrupted":
            self._stderr.print(Text(error.what))
            return
        self._stderr.print(Text.assemble(("error: ", "bold red"), printable(error.what)))
        if error.why:
            self._stderr.print(Text.assemble(("  why:  ", "bold"), printable(error.why)))
        if error.fix:
            self._stderr.print(Text.assemble(("  fix:  ", "bold green"), printable(error.fix)))

    def error_stream_write(self, text: str) -> None:
        """A traceback, as it is."""
        self._stderr.file.write(text)


class _NarrowStream:
    """A stream that takes any text and writes what its encoding has, symbols in ASCII."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._encoding = known_encoding(stream)

    def write(self, text: str) -> int:
        self._stream.write(to_encoding(text, self._encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def speaks_unicode(stream: IO[str]) -> bool:
    """Whether the stream's encoding has the symbols that the output uses."""
    try:
        "❯·━✓".encode(known_encoding(stream))
    except UnicodeEncodeError:
        return False
    return True


def known_encoding(stream: IO[str]) -> str:
    """The stream's encoding; ASCII where it has none, or one that Python does not know."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    try:
        "".encode(encoding)
    except LookupError:
        return "ascii"
    return encoding


def _console(stream: IO[str]) -> Console:
    """A console that takes text literally: no markup, no emoji names, no guessed highlighting."""
    file: Any = stream if speaks_unicode(stream) else _NarrowStream(stream)
    terminal = stream.isatty()
    return Console(
        file=file,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
        width=None if terminal else _UNFOLDED,
    )


def _print(console: Console, renderable: RenderableType) -> None:
    """Print; without the blanks that fill a table's last column where there are no colours."""
    if console.is_terminal:
        console.print(renderable)
        return
    with console.capture() as capture:
        console.print(renderable)
    lines = capture.get().split("\n")
    console.file.write("\n".join(line.rstrip() for line in lines))


def calm_libraries() -> None:
    """Keep other packages' bars, warnings and logs off the screen: a command says what matters in
    its own words.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Not WARNING: its client says every try of a connection, whose end is an error of ours.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
