"""Why there is no operator on this machine."""

from __future__ import annotations


class Unavailable(Exception):
    """There is no operator here; the text says why, and in brackets at its end what helps."""
