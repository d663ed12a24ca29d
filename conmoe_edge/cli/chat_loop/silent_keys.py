"""Keys that are pressed while a model loads or answers are not shown in between; they wait for the next prompt.

Ctrl-C works as ever. Where standard input is no terminal, and on Windows, nothing is done.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_keys() -> Iterator[None]:
    """The terminal shows no key inside the block."""
    try:
        import termios
    except ImportError:
        yield
        return
    try:
        place = sys.stdin.fileno()
        before = termios.tcgetattr(place)
    except (OSError, ValueError, AttributeError, termios.error):  # a pipe, a file, a stand-in
        yield
        return
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(place, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)
