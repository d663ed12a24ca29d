"""An engine whose rounds a test can hold, so that what a test needs to be running is running for as long as it is
needed, however fast or slow the machine is.

A server process is held by a file: ``held/sitecustomize.py`` lets ``touch`` put ``until_let_go`` before the rounds of
every process whose environment names ``FOLDER``, and ``Holds`` makes the files. In this process ``EngineHold`` does
without. Everything else is the real server.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conmoe_edge.serve.engine import Engine

FOLDER = "HELD_ROUNDS_OF_CONMOE"
"""Environment variable: where the files are that hold processes, each with its process's id as its name.

It does not begin with ``CONMOE_``: files of kept prompts count only where the variables that do are the same.
"""
_LOADING = "loading"
_LOOK_SECONDS = 0.005
_LENIENT_SECONDS = 60
"""In place of the seconds in which an answer has to end when the server stops, and a refused client to stop sending: a
machine may stand still for as long as these are. No test is about them."""


def touch(module: Any) -> None:
    """A module of the server that was imported in a process of its own."""
    if module.__name__.endswith(".engine"):
        folder = Path(os.environ[FOLDER])
        kind, open_package = module.Engine, module.Engine._open
        kind._next_round = until_let_go(kind._next_round, HeldByFile(folder))

        def held_open(engine: Engine) -> None:
            while (folder / _LOADING).exists():
                time.sleep(_LOOK_SECONDS)
            open_package(engine)

        kind._open = held_open
    elif module.__name__.endswith(".guard"):
        module._LINGER_SECONDS = _LENIENT_SECONDS
    else:
        module.Limits = functools.partial(module.Limits, stop_seconds=_LENIENT_SECONDS)


def until_let_go(
    next_round: Callable[[Engine], bool], is_held: Callable[[], bool]
) -> Callable[[Engine], bool]:
    """``next_round`` of an engine, which does not come back while ``is_held``.

    Meanwhile answers begin as far as there is room, and those whose client has left end; none gets on by a token.
    """

    def held_round(engine: Engine) -> bool:
        while next_round(engine):
            if not is_held():
                return True
            for job in [one for one in engine._running if one.cancelled]:
                engine._running.remove(job)
                engine._take([job], engine._turns)
            if engine._running:
                time.sleep(_LOOK_SECONDS)
        return False

    return held_round


class HeldByFile:
    """Whether the rounds of this process are held: its file has how many of them still pass, and a word of its own."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / str(os.getpid())
        self._text, self._left = "", 0

    def __call__(self) -> bool:
        try:
            text = self._path.read_text()
        except OSError:
            return False
        if text != self._text:
            self._text, self._left = text, int(text.split()[0])
        self._left -= 1
        return self._left < 0


class Holds:
    """The files that hold the processes of a server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def held(self, pid: int, after: int = 0) -> Iterator[Callable[[int], None]]:
        """No answer of process ``pid`` gets on behind its next ``after`` rounds, until the block ends; what it gives
        lets some more rounds pass.

        A round is a chunk of a prompt or a few tokens of each answer that runs.
        """
        path, part = self._folder / str(pid), self._folder / f"{pid}.part"

        def let_pass(rounds: int) -> None:
            part.write_text(f"{rounds} {secrets.token_hex(8)}")
            part.replace(path)

        let_pass(after)
        try:
            yield let_pass
        finally:
            path.unlink()

    def hold_loading(self) -> None:
        """No process opens its package before ``let_load``."""
        (self._folder / _LOADING).touch()

    def let_load(self) -> None:
        """Undo that."""
        (self._folder / _LOADING).unlink()


class EngineHold:
    """Holds an engine of this process that was not started yet."""

    def __init__(self, engine: Engine) -> None:
        self._lock = threading.Lock()
        self._left: int | None = None
        held_round = until_let_go(type(engine)._next_round, self._is_held)
        engine._next_round = lambda: held_round(engine)

    @contextlib.contextmanager
    def held(self, after: int = 0) -> Iterator[Callable[[int], None]]:
        """As ``Holds.held``."""
        self._let_pass(after)
        try:
            yield self._let_pass
        finally:
            with self._lock:
                self._left = None

    def _let_pass(self, rounds: int) -> None:
        with self._lock:
            self._left = rounds

    def _is_held(self) -> bool:
        with self._lock:
            if self._left is None:
                return False
            self._left -= 1
            return self._left < 0
