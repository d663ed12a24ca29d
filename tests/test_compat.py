"""Names that differ between releases of transformers: each is found, on every release."""

from __future__ import annotations

from conmoe_edge.compat import CACHE_ARGUMENTS, cache_of


def test_the_cache_is_found_under_each_name() -> None:
    cache = object()
    for name in CACHE_ARGUMENTS:
        assert cache_of({name: cache, "use_cache": True}) is cache
    assert cache_of({"use_cache": True, "past_key_values": None}) is None
