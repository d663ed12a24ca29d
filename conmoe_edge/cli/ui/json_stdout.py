"""``--json``: exactly one value on stdout, whatever libraries and child processes print there.

While a command with ``--json`` runs, ``sys.stdout`` and the descriptor below it lead to stderr, and the value goes past
them. One run of the program writes one value: what fails after it has been written is said on stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import IO, Any

from conmoe_edge.checkpoint.format.finite_json import finite

SCHEMA_VERSION = 1


class JsonStdout:
    """The stdout of one run of the program."""

    def __init__(self) -> None:
        self.written = False
        self._stream: IO[str] | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing but the value reaches stdout inside the block; where that is so already, nothing is done."""
        if self._stream is not None:  # one command calls another
            yield
            return
        with ExitStack() as stack:
            self._stream = sys.stdout
            below = _descriptors()
            if below is not None:
                out, error = below
                sys.stdout.flush()
                kept = os.dup(out)
                # ASCII escapes: the value is the same in every encoding that a pipe may have.
                self._stream = stack.enter_context(os.fdopen(kept, "w", encoding="ascii"))
                os.dup2(error, out)
                stack.callback(os.dup2, kept, out)
            stack.enter_context(redirect_stdout(sys.stderr))
            try:
                yield
            finally:
                self._stream = None

    def write(self, value: dict[str, Any]) -> bool:
        """Write the value; false, and nothing is written, where one was before."""
        if self.written:
            return False
        self.written = True
        stream = self._stream or sys.stdout
        whole = finite({"schema_version": SCHEMA_VERSION, **value})
        stream.write(json.dumps(whole, indent=2, allow_nan=False) + "\n")
        stream.flush()
        return True


_RUN: ContextVar[JsonStdout | None] = ContextVar("json_stdout", default=None)


@contextmanager
def one_run() -> Iterator[None]:
    """One run of the program begins and ends."""
    token = _RUN.set(JsonStdout())
    try:
        yield
    finally:
        _RUN.reset(token)


def of_this_run() -> JsonStdout:
    """The stdout of the run; outside of any a new one."""
    return _RUN.get() or JsonStdout()


def _descriptors() -> tuple[int, int] | None:
    """Those of stdout and stderr; ``None`` where something else stands in for them, as in a test."""
    try:
        return sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return None
