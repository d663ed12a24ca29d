"""How long the threads of torch's OpenMP wait awake for each other.

Behind a parallel operation libgomp lets its threads spin, by default for 300,000 turns, some milliseconds. On an idle
machine that saves the time to wake up. Beside a browser, a compiler or the operator's own threads the thread that is
waited for is not on a processor, and those that spin keep it from getting there: answers became several times slower.
So the turns are bounded here: long enough for the gaps between operations, far shorter than a turn of the scheduler.

libgomp reads the variable once, when it is loaded, that is, when torch is imported. ``bound_spinning`` therefore runs
when ``conmoe_edge`` is imported. It changes nothing where the user has said how threads wait, and can change nothing
where torch came first; ``doctor`` says which of these it is.
"""

from __future__ import annotations

import os
import sys

SPIN_VARIABLE = "GOMP_SPINCOUNT"
POLICY_VARIABLE = "OMP_WAIT_POLICY"
AWAKE_VARIABLE = "CONMOE_OPERATOR_AWAKE"
"""Microseconds that the operator's own threads stay awake (``offload/kernels/cpu/csrc/pool.h``)."""
TURNS = 2000

_said: list[str] = []


def bound_spinning() -> None:
    """Bound the turns, once a process, for torch's OpenMP of this process and of those that it starts."""
    if _said:
        return
    if POLICY_VARIABLE in os.environ:
        _said.append("user")
    elif SPIN_VARIABLE in os.environ:  # our own, in a process that we started
        _said.append("bounded" if os.environ[SPIN_VARIABLE] == str(TURNS) else "user")
    elif "torch" in sys.modules:
        _said.append("late")
    else:
        os.environ[SPIN_VARIABLE] = str(TURNS)
        _said.append("bounded")


def how_threads_wait() -> str:
    """``bounded`` as said above, ``user`` as the environment says, ``late`` where torch was imported before."""
    return _said[0] if _said else "late"
