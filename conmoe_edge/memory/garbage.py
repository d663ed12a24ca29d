"""Python's garbage collector, where everything that a process needs is there.

A full pass looks at every object of torch and transformers, a quarter of a second on a slow core, and one is due soon
after a model was opened: it would fall into the first answer. ``settle`` has it now, and has later passes look only at
what is made from then on. For a process that exists to run one model; a library must not decide that for its caller.

Memory: what is there now and becomes garbage in a cycle later stays.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def settle() -> None:
    """Collect once, and count what is left as there for good."""
    gc.collect()
    gc.freeze()


@contextmanager
def no_collections() -> Iterator[None]:
    """Within it nothing is looked through. For some seconds in which a hundred thousand small objects are made that are
    all needed until the end: every pass would find them alive. What another thread makes meanwhile waits as well.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
