"""Where a record lies on the device. Torch-free: reports read tables of places without loading it."""

from __future__ import annotations

Place = tuple[int, int]
"""Number of the slot pool, which is that of the record layout; number of the cache slot in it."""
