"""How many cases a fuzzer runs, and the seeds that make each case the same everywhere.

``CONMOE_FUZZ_CASES`` sets the number (``make fuzz``); without it a fuzzer runs the few that its caller names, so that
the default tests stay fast. A failure names its seed, and ``CONMOE_FUZZ_SEED`` runs that case alone.
"""

from __future__ import annotations

import os
from random import Random


def seeds(few: int) -> list[int]:
    """The seeds to run: ``few`` of them by default."""
    alone = os.environ.get("CONMOE_FUZZ_SEED")
    if alone is not None:
        return [int(alone)]
    return list(range(int(os.environ.get("CONMOE_FUZZ_CASES") or few)))


def random_of(seed: int) -> Random:
    """The generator of one case."""
    return Random(seed)
