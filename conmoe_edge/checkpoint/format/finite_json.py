"""Values for JSON, which has no word for NaN and infinity."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """A copy in which every number that JSON cannot write (a ratio of infinity, a loss of NaN) is ``None``, tuples are
    lists and keys are strings.
    """
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
