"""One line where answers are several times slower than they could be, for want of a compiler."""

from __future__ import annotations

import os

_SWITCH = "CONMOE_OPERATOR"


def slow_line(device: str) -> str:
    """Why, and what helps; empty where the compiled operator is there, was switched off, or is not for ``device``."""
    from conmoe_edge.offload.kernels.cpu.bindings import operator, why_not

    if device != "cpu" or _SWITCH in os.environ or operator() is not None:
        return ""
    reason = why_not().strip().partition("\n")[0]
    return f"Answers are several times slower than they could be: {reason}. conmoe-edge doctor says more."
