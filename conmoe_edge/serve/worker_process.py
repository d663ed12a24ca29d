"""The process of one package of several: ``python -m conmoe_edge.serve.worker_process``.

A package has a process of its own, so that all its memory goes back to the system with it, the libraries' too, and a
crash in it costs nobody else. It is a server like that of one package, on this machine only, with a key that only
its parent knows; the parent talks to it through its stdin and stdout in lines of JSON (``worker_order.py``). It ends
where those end, so nothing stays behind a parent that was killed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

from conmoe_edge.api.slow_line import slow_line
from conmoe_edge.errors import ConmoeError, DoesNotFit, OutOfMemory
from conmoe_edge.memory.budget import Budget
from conmoe_edge.memory.garbage import settle
from conmoe_edge.memory.heap import one_heap, trim_heap
from conmoe_edge.serve.jobs import Loaded
from conmoe_edge.serve.package_loader import PackageLoader
from conmoe_edge.serve.server import Server
from conmoe_edge.serve.worker_order import WorkerOrder

log = logging.getLogger("conmoe_edge.serve")

_BUG = "the server's stderr has the traceback; please report it"


def main() -> int:
    """Serve what the first line on stdin orders; the exit status."""
    say = _telling()
    order = WorkerOrder.of_line(sys.stdin.readline())
    one_heap()
    loader = PackageLoader(order.loading, tell=lambda text: say({"warning": text}))
    whole = order.loading.budget
    assert whole is not None, "the server says what all of them have"
    try:
        needs = loader.needs(whole)
        say({"needs": {"least": needs.least, "everything": needs.everything}})
        granted = json.loads(sys.stdin.readline() or "{}").get("budget")
        if granted is None:
            return 0  # nobody wants it any more
        budget = part_of(whole, granted)
        server = Server(
            order.settings,
            lambda progress: loader.load(progress, budget),
            on_ready=lambda loaded: _ready(server, loaded, say),
        )
        threading.Thread(target=_stop_when_told, args=(server,), daemon=True).start()
        server.run()
    except ConmoeError as error:
        say({"failed": _told(error)})
        return error.exit_code
    except Exception as error:
        log.exception("%s could not be loaded", order.settings.name)
        say({"failed": _told(ConmoeError("It could not be loaded.", type(error).__name__, _BUG))})
        return 1
    return 0


def part_of(whole: Budget, nbytes: int) -> Budget:
    """``nbytes`` of a budget, with as large a share of the memory below the device."""
    if whole.host_bytes is None or not whole.device_bytes:
        return replace(whole, device_bytes=nbytes)
    host = whole.host_bytes * nbytes // whole.device_bytes
    return replace(whole, device_bytes=nbytes, host_bytes=min(whole.host_bytes, host))


def _telling() -> Callable[[dict[str, Any]], None]:
    """What writes to the parent. Whatever else is printed in this process goes to stderr."""
    pipe: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(value: dict[str, Any]) -> None:
        with lock:
            pipe.write(json.dumps(value) + "\n")
            pipe.flush()

    return say


def _ready(server: Server, loaded: Loaded, say: Callable[[dict[str, Any]], None]) -> None:
    settle()
    trim_heap()
    stats = loaded.model.conmoe.stats()
    say(
        {
            "ready": {
                "url": server.url,
                "resident": stats.resident,
                "prototypes": stats.prototypes,
                "device": stats.device,
                "slow": slow_line(stats.device),
            }
        }
    )


def _stop_when_told(server: Server) -> None:
    sys.stdin.readline()  # a word, or the end of the parent
    server.stop()


def _told(error: ConmoeError) -> dict[str, Any]:
    """An error as the parent tells it."""
    return {
        "what": error.what,
        "why": error.why,
        "fix": error.fix,
        "memory": isinstance(error, (DoesNotFit, OutOfMemory)),
        "least": getattr(error, "least_bytes", None),
    }


if __name__ == "__main__":
    sys.exit(main())
