"""The compiled operator of this machine: weights in any stored form times few rows of activations, at the speed of the
memory.

``operator()`` is the one way in: an ``Operator``, or ``None`` where the machine has none (``why_not`` says why);
callers then use torch's own kernels. Which of the two it is depends on the machine, never on a stopwatch, so results
are the same bits from run to run.
"""

from __future__ import annotations

import ctypes
from functools import cache

from conmoe_edge.offload.kernels.cpu.attention_tables import (
    AttentionTable,
    Cached,
    LatentTable,
    Positions,
)
from conmoe_edge.offload.kernels.cpu.build import Library, found_library
from conmoe_edge.offload.kernels.cpu.decoder_tables import BlockTable, RouterTable
from conmoe_edge.offload.kernels.cpu.operator import Operator, takes_many
from conmoe_edge.offload.kernels.cpu.self_test import check
from conmoe_edge.offload.kernels.cpu.structs import (
    ExpertGate,
    Form,
    LayerTable,
    MlpTable,
    Prepared,
    PrototypeTable,
    RmsNorm,
)
from conmoe_edge.offload.kernels.cpu.together_tables import FoundTogether
from conmoe_edge.offload.kernels.cpu.unavailable import Unavailable

__all__ = [
    "AttentionTable",
    "BlockTable",
    "Cached",
    "ExpertGate",
    "Form",
    "FoundTogether",
    "LatentTable",
    "LayerTable",
    "Library",
    "MlpTable",
    "Operator",
    "Positions",
    "Prepared",
    "PrototypeTable",
    "RmsNorm",
    "RouterTable",
    "operator",
    "operator_library",
    "takes_many",
    "why_not",
]


def operator() -> Operator | None:
    """This machine's operator, compiled on the first call unless the wheel has it; ``None`` where there is none."""
    return _state()[0]


def operator_library() -> Library | None:
    """The library that it is in, with its instruction set and who made it; ``None`` where there is none."""
    return _state()[2]


def why_not() -> str:
    """Why there is no operator; empty where there is one."""
    return _state()[1]


@cache
def _state() -> tuple[Operator | None, str, Library | None]:
    try:
        found = found_library()
        made = Operator(ctypes.CDLL(str(found.path)))
        check(made)
    except (Unavailable, OSError, AttributeError) as error:
        return None, str(error), None
    return made, "", found
