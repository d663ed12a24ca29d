"""Chat templates, rendered in a process of their own that is ended when it takes too long or too much.

The process (``template_process.py``) starts with the first template, serves all templates and threads of this process
one after another, and is replaced when it had to be ended. A turn takes about a millisecond. Memory: 20 MiB, 10 of them
its own, and while it renders at most ``MEMORY_BYTES`` more.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from conmoe_edge.errors import ConmoeError, PackageError, UsageError
from conmoe_edge.units import MIB, human_size

CPU_SECONDS = 2.0
"""Processor time of one request; templates take a thousandth of it."""
CLOCK_SECONDS = 60.0
"""Of one request on a machine that is busy with other things."""
MEMORY_BYTES = 256 * MIB
"""On top of what the process takes at rest."""
GROWTH = 8
"""A prompt may be this many times as long as the messages and the template, and ``SPARE_CHARACTERS`` longer."""
SPARE_CHARACTERS = 1 << 20
POLL_SECONDS = 0.02

_PROGRAM = Path(__file__).with_name("template_process.py")
_START = (
    "import sys; sys.path += sys.argv[3:]; import runpy;"
    " runpy.run_path(sys.argv[1])['serve'](int(sys.argv[2]))"
)
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")

Messages = Sequence[Mapping[str, Any]]
End = Literal["time", "memory", "length", "stopped", "gone"]


class Ended(Exception):
    """The process was ended, or ended itself, before it had answered."""

    def __init__(self, end: End) -> None:
        self.end: End = end
        super().__init__(end)


class TemplateRenderer:
    """Renders templates for any number of threads. ``shared`` is the one of this process."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._turn = threading.Lock()
        self._process: _Process | None = None

    def render(
        self,
        template: str,
        conversations: Sequence[Messages],
        variables: Mapping[str, Any],
        stop_event: threading.Event | None = None,
    ) -> list[str | None]:
        """The text of each conversation, as transformers' ``apply_chat_template`` has it. The first is there; another
        is ``None`` where the template refuses it.

        Args:
            template: its source.
            conversations: plain JSON values.
            variables: what the template sees besides ``messages``.
            stop_event: ends the process once it is set.

        Raises:
            UsageError: the template refuses the messages, fails on them, or goes over a limit.
            PackageError: it is no template.
            ConmoeError: no process can be started, or ``stop_event`` was set.
        """
        return self._ask(_request(template, conversations, variables), stop_event)

    def taken(
        self, template: str, conversation: Messages, variables: Mapping[str, Any]
    ) -> str | None:
        """The text of one conversation; ``None`` where the template refuses it or fails on it.

        Raises:
            UsageError, PackageError, ConmoeError: as ``render`` for the rest, which says nothing of the template.
        """
        reply = self._reply(_request(template, [conversation], variables), None)
        return None if reply.get("error") in ("refused", "failed") else _texts(reply)[0]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - there is one renderer
    def looked_for(self, template: str) -> tuple[str, ...]:
        """Constants that the template may look for in a message.

        Raises:
            ConmoeError: as ``render``.
        """
        return tuple(self._ask({"template": template}, None))

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process; a next template starts another."""
        with self._turn:
            self._drop()

    def _ask(self, request: dict[str, Any], stop_event: threading.Event | None) -> list[Any]:
        return _texts(self._reply(request, stop_event))

    def _reply(self, request: dict[str, Any], stop_event: threading.Event | None) -> dict[str, Any]:
        while not self._turn.acquire(timeout=POLL_SECONDS):
            if stop_event is not None and stop_event.is_set():
                raise _error_of("stopped")
        try:
            if self._process is None or not self._process.alive:
                self._drop()
                self._process = _Process()
            reply = self._process.ask(request, stop_event)
            if reply.get("error") == "memory":
                self._drop()  # what is left of it may not be enough for the next
        except (
            BaseException
        ) as error:  # an interrupt too: an answer to come would be taken for the next one's
            self._drop()
            if isinstance(error, Ended):
                raise _error_of(error.end) from None
            raise
        finally:
            self._turn.release()
        return reply

    def _drop(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def after_fork(self) -> None:
        """In a forked child: the process is the parent's."""
        self._turn = threading.Lock()
        self._process = None


def _request(
    template: str, conversations: Sequence[Messages], variables: Mapping[str, Any]
) -> dict[str, Any]:
    given = json.dumps([conversations, variables], ensure_ascii=False)
    return {
        "template": template,
        "conversations": conversations,
        "variables": variables,
        "characters": SPARE_CHARACTERS + GROWTH * (len(template) + len(given)),
    }


def _texts(reply: dict[str, Any]) -> list[Any]:
    if "texts" in reply:
        return reply["texts"]
    raise _error_of(reply["error"], reply.get("why", ""))


class _Process:
    """One process. Not for several threads at once."""

    def __init__(self) -> None:
        arguments = [str(_PROGRAM), str(MEMORY_BYTES), *_folders()]
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={k: os.environ[k] for k in _KEPT_VARIABLES if k in os.environ},
                start_new_session=True,  # a Ctrl-C in the terminal is not for it
            )
        except OSError as error:
            raise ConmoeError(
                "The process that renders chat templates cannot be started.",
                error.strerror or str(error),
                "free some memory or processes, and try again",
            ) from error
        self._ended = False
        self.pid = self._popen.pid

    @property
    def alive(self) -> bool:
        return not self._ended and self._popen.poll() is None

    def ask(self, request: dict[str, Any], stop_event: threading.Event | None) -> dict[str, Any]:
        """One request and its reply.

        Raises:
            Ended: the process is gone.
        """
        assert self._popen.stdin is not None and self._popen.stdout is not None, "both are pipes"
        data = json.dumps({**request, "seconds": CPU_SECONDS}, ensure_ascii=False).encode("utf-8")
        watch = _Watch(self._popen, stop_event)
        line = b""
        with watch, contextlib.suppress(OSError):
            self._popen.stdin.write(data + b"\n")
            self._popen.stdin.flush()
            line = self._popen.stdout.readline()
        if watch.end is not None or not line.endswith(b"\n"):
            raise Ended(watch.end or "gone")
        return json.loads(line)

    def end(self) -> None:
        self._ended = True
        self._popen.kill()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not written yet
                    pipe.close()
        self._popen.wait()


class _Watch:
    """Ends a process that goes over a limit while the block runs; ``end`` says which."""

    def __init__(self, popen: subprocess.Popen[bytes], stop_event: threading.Event | None) -> None:
        self.end: End | None = None
        self._popen = popen
        self._stop = stop_event
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="conmoe-template", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        started = time.monotonic()
        first: tuple[float, int] | None = None
        while not self._done.wait(POLL_SECONDS):
            taken = _taken(self._popen.pid)
            if taken is None:
                return  # it ended by itself; the reader sees that
            first = first or taken
            if self._stop is not None and self._stop.is_set():
                self.end = "stopped"
            elif taken[1] > first[1] + MEMORY_BYTES:
                self.end = "memory"
            elif taken[0] > first[0] + CPU_SECONDS or time.monotonic() > started + CLOCK_SECONDS:
                self.end = "time"
            if self.end is not None:
                self._popen.kill()
                return


def _taken(pid: int) -> tuple[float, int] | None:
    """Processor seconds and resident bytes of a process; ``None`` where it is gone."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return times.user + times.system, process.memory_info().rss
    except psutil.Error:
        return None


@functools.cache
def _folders() -> list[str]:
    """Where jinja2 and what it needs are installed."""
    specs = (importlib.util.find_spec(name) for name in ("jinja2", "markupsafe"))
    return [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]


def _error_of(kind: str, why: str = "") -> ConmoeError:
    mend = "other messages, or a package whose chat_template.jinja is mended"
    if kind == "stopped":
        return ConmoeError("Stopped before the prompt was there.")
    if kind == "syntax":
        return PackageError(
            "The model's chat template cannot be read.",
            why,
            "mend chat_template.jinja of the package",
        )
    if kind == "refused":
        return UsageError("The model's chat template refuses these messages.", why, mend)
    if kind == "failed":
        return UsageError("The model's chat template fails on these messages.", why, mend)
    reasons = {
        "time": ("does not come to an end", f"it was stopped after {CPU_SECONDS:.0f} s"),
        "memory": (
            "takes too much memory",
            f"it may take {human_size(MEMORY_BYTES)}; shorter messages take less",
        ),
        "length": (
            "writes too much",
            f"its text is more than {GROWTH} times as long as the messages and the template",
        ),
        "gone": ("ended its process", "it is nested too deeply, or memory ran out"),
    }
    what, reason = reasons[kind]
    return UsageError(f"The model's chat template {what}.", reason, mend)


shared = TemplateRenderer()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared.after_fork)
