"""One loaded model, several threads: they take turns.

Cache slots, scratch memory and the key-value cache that the budget has room for are there once. ``take_turns`` puts one
lock around every call of a model, hooks included, and around ``generate``: a second thread waits until the first one's
answer is done, as the memory is planned for one. The thread that holds the lock may call the model again (a long prompt
runs in chunks, each of which is a call).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn


def take_turns(model: nn.Module) -> None:
    """Let one thread at a time into ``model``."""
    lock = threading.RLock()
    # ``Module.__call__`` looks up ``_call_impl``, which runs the hooks, on the instance. A hook that takes the lock and
    # another that gives it back would keep it where KeyboardInterrupt ends a forward: torch calls none behind that.
    for name in ("_call_impl", "generate"):
        whole = getattr(model, name, None)
        if whole is not None:
            setattr(model, name, _locked(whole, lock))


def _locked(whole: Callable[..., Any], lock: threading.RLock) -> Callable[..., Any]:
    @functools.wraps(whole)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return whole(*args, **kwargs)

    return alone
