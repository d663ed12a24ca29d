"""The command line in a child of its own: real descriptors, its own environment, folder and user, and nothing to import
again, because the child is a fork of the test.
"""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from tests.patience import PATIENCE

FORK: Any = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
NOBODY = 65534


@dataclass(frozen=True)
class Done:
    """What a command left."""

    status: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """Every folder that a command knows without being told: one user's, and nobody else's."""

    root: Path

    @property
    def home(self) -> Path:
        """``HOME``; XDG folders are below it."""
        return self.root / "home"

    @property
    def here(self) -> Path:
        """The current folder."""
        return self.root / "here"

    @property
    def temporary(self) -> Path:
        """``TMPDIR``."""
        return self.root / "tmp"

    def made(self) -> Sandbox:
        """Itself, with its folders."""
        for folder in (self.home, self.here, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    @property
    def environment(self) -> dict[str, str | None]:
        """What leads there; ``None`` takes a variable away. The caches stay: one has the compiled operator."""
        names = ("CONMOE_CONFIG_DIR", "CONMOE_STATE_DIR", "CONMOE_DEBUG")
        xdg = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
        return {
            **dict.fromkeys((*names, *xdg)),
            "XDG_CACHE_HOME": str(user_cache_path()),
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "SHELL": "/bin/bash",
        }


@functools.cache
def _imported() -> None:
    """What commands import late, once for all children."""
    import conmoe_edge

    for module in pkgutil.walk_packages(conmoe_edge.__path__, "conmoe_edge."):
        if not module.name.startswith(
            ("conmoe_edge.integrations.vllm", "conmoe_edge.integrations.harness")
        ):
            importlib.import_module(module.name)
    for name in (
        "torch._dynamo",
        "transformers.models.olmoe.modeling_olmoe",
        "transformers.generation",
    ):
        importlib.import_module(name)


def command(
    *words: str,
    sandbox: Sandbox,
    more: Mapping[str, str | None] | None = None,
    stdin: str = "",
    user: int | None = None,
    first: Callable[[], None] | None = None,
    interrupt_on: str = "",
    timeout: float = PATIENCE,
) -> Done:
    """Run ``conmoe-edge`` with these words.

    Args:
        sandbox: where it runs.
        more: variables on top of those of the sandbox.
        stdin: what it can read.
        user: the user to become, for permissions that bind.
        first: called in the child before the command.
        interrupt_on: Ctrl-C comes as soon as this has been said, on stdout or stderr.
        timeout: seconds; then it is killed, and the test fails.
    """
    _imported()
    with tempfile.TemporaryDirectory() as kept:
        out, error, given = (Path(kept, name) for name in ("out", "error", "in"))
        given.write_text(stdin)
        start = time.perf_counter()
        process = FORK.Process(
            target=_child,
            args=(words, sandbox, more or {}, user, first, str(given), str(out), str(error)),
        )
        process.start()
        asked = False
        while process.is_alive() and time.perf_counter() - start < timeout:
            process.join(0.05)
            said = "".join(path.read_text() for path in (out, error) if path.exists())
            if interrupt_on and not asked and interrupt_on in said:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGINT)
                asked = True
        seconds = time.perf_counter() - start
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"{words} took {timeout} s: {error.read_text()[-2000:]}")
        assert process.exitcode is not None
        return Done(process.exitcode, out.read_text(), error.read_text(), seconds)


def _child(
    words: Sequence[str],
    sandbox: Sandbox,
    more: Mapping[str, str | None],
    user: int | None,
    first: Callable[[], None] | None,
    given: str,
    out: str,
    error: str,
) -> None:
    status = 99
    try:
        for number, (path, flags) in enumerate(
            (
                (given, os.O_RDONLY),
                (out, os.O_WRONLY | os.O_CREAT),
                (error, os.O_WRONLY | os.O_CREAT),
            )
        ):
            opened = os.open(path, flags, 0o666)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, buffering=1, encoding="utf-8", closefd=False)
            for number, mode in enumerate(("r", "w", "w"))
        )
        for name, value in {**sandbox.environment, **more}.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = None
        os.chdir(sandbox.here)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.collect()
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        if first is not None:
            first()
        from conmoe_edge.cli.main import main

        main(list(words))
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
