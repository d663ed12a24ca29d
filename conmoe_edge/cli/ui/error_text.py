"""Exceptions to the three sentences that a user reads, and to the status the process leaves with.
Prints nothing.

``describe`` is the one place that knows foreign exceptions (click's, the operating system's, out of
memory): everything the package raises on purpose already carries its own sentences.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

import click

from conmoe_edge.errors import ConmoeError

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
_LONGEST = 800
"""Characters of one sentence that are shown."""
_OF_THE_PATH = {
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS, errno.EEXIST)
}


class Interrupted(Exception):
    """The user stopped a command; ``message`` says what was kept and how to go on."""

    def __init__(self, message: str = "Stopped.") -> None:
        self.message = message
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class ErrorText:
    """What is shown of an error: the sentences, the class name for scripts, and the exit status."""

    type: str
    what: str
    why: str = ""
    fix: str = ""
    exit_code: int = FAILURE

    def to_json(self) -> dict[str, Any]:
        """The value of ``"error"`` in ``--json`` mode."""
        return {"type": self.type, "what": self.what, "why": self.why, "fix": self.fix}


def describe(error: BaseException) -> ErrorText:
    """The text of any exception; one that was not foreseen gets a single line and the way to its
    traceback.
    """
    name = type(error).__name__
    if isinstance(error, ConmoeError):
        what, why, fix = map(_one_line, (error.what, error.why, error.fix))
        return ErrorText(name, what, why, fix, error.exit_code)
    if isinstance(error, Interrupted):
        return ErrorText("Interrupted", error.message, exit_code=INTERRUPTED)
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return ErrorText("Interrupted", "Stopped.", exit_code=INTERRUPTED)
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, OSError):
        return _operating_system(error)
    # torch's class is recognised by name: importing torch to ask costs seconds and may be what
    # failed.
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return ErrorText(
            name,
            "Memory ran out.",
            _first_line(error),
            "close other programs, or give a smaller --gpu or --context; `conmoe-edge doctor` "
            "shows who uses what",
        )
    return ErrorText(
        name,
        f"Something went wrong that was not foreseen: {name}: {_first_line(error)}".rstrip(": "),
        fix="run the same command with --debug for the traceback, and report it",
    )


def _usage(error: click.ClickException) -> ErrorText:
    """Click's complaint in our shape; the fix is the help of the command that complained."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "conmoe-edge"
    message = _one_line(error.format_message().strip())
    if isinstance(error, click.NoSuchCommand | click.NoSuchOption):
        what, _, suggestion = message.partition(". ")
        suggestion = suggestion.strip().strip("()")
        fix = f"{suggestion} `{path} --help` lists all." if suggestion else f"{path} --help"
        return ErrorText("UsageError", f"{what.rstrip('.')}.", "", fix, USAGE)
    return ErrorText("UsageError", message, "", f"{path} --help", error.exit_code)


def _operating_system(error: OSError) -> ErrorText:
    """The file errors that a user can do something about, by their number."""
    name = type(error).__name__
    where = _shortened(str(error.filename)) if error.filename else "a file"
    reason = error.strerror or _first_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ErrorText(
            "NoSpace",
            "The disk is full.",
            f"{where} could not be written",
            "free some space and run the same command again: it goes on where it stopped",
        )
    if isinstance(error, PermissionError):
        return ErrorText(
            name,
            f"No permission for {where}.",
            reason,
            "take another folder, or change the permissions",
        )
    if isinstance(error, FileNotFoundError):
        return ErrorText(name, f"{where} is not there.", reason, "check the path")
    if error.errno in _OF_THE_PATH:
        return ErrorText(name, f"{where} cannot be used.", reason, "choose another path")
    return ErrorText(
        name, f"{where} could not be used: {reason}.", fix="run with --debug for the traceback"
    )


def _one_line(text: str) -> str:
    """A sentence may quote what a file says, and a file may say anything at any length."""
    text = " ".join(text.split("\n"))
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _shortened(path: str) -> str:
    """A path of thousands of characters says as much with its two ends."""
    return path if len(path) <= 240 else f"{path[:110]}…{path[-110:]}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else ""
