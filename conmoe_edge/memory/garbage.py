"""Python's garbage collector, where everything that a process needs is there.

A full pass looks at every object of torch and transformers, a quarter of a second on a slow core, and one is due soon
after a model was opened: it would fall into the first answer. ``settle`` has it now, and has later passes look only at
what is made from then on. For a process that exists to run one model; a library must not decide that for its caller.

Memory: what is there now and becomes garbage in a cycle later stays.
"""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect once, and count what is left as there for good."""
    gc.collect()
    gc.freeze()
