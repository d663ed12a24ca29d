"""Tensors that a checkpoint may have, that the text model has no place for, and without which every answer is the same.

They are known by name, and this is the one list. Whatever else has no place is refused (``agreement.py``).
"""

from __future__ import annotations

import re

STALE = ("inv_freq", "masked_bias", "cos_cached", "sin_cached", "position_ids")
"""How names end of buffers that old releases wrote and that are computed since."""

_FURTHER_TOKENS = re.compile(r"(^|\.)(mtp|nextn|eagle)(_\w+)?\.")
"""Modules that predict tokens behind the next one; what they say is only ever a guess to be checked."""

_OTHER_SENSES = re.compile(
    r"(^|\.)("
    r"visual|vision\w*|image\w*|img\w*|pixel\w*|audio\w*|speech\w*|video\w*"
    r"|multi_?modal\w*|multimodal\w*|mm_\w+|embed_(vision|audio|image)\w*|view_seperator|aligner|resampler"
    r"|talker|code2wav|token2wav"
    r")(\.|$)"
)
"""Parts that turn pictures and sound into embeddings, or tokens into sound: text alone never passes them."""


def is_harmless(name: str) -> bool:
    """Whether a tensor outside the decoder layers is of a kind that text does not need."""
    return bool(name.endswith(STALE) or _FURTHER_TOKENS.search(name) or _OTHER_SENSES.search(name))
