"""What changes between the releases of transformers that this package runs on, in one place.

No other module names an argument or an attribute that one release has and another has not. Each function here has a
test that fails when the name changes again (``tests/test_compat.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CACHE_ARGUMENTS = ("past_key_values", "cache")
"""The key-value cache in a ``forward`` of transformers: the first to 5.23, the second from 5.24 on."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among the keyword arguments of a model's, layer's or attention's ``forward``; ``None`` where
    there is none.
    """
    for name in CACHE_ARGUMENTS:
        found = arguments.get(name)
        if found is not None:
            return found
    return None
