"""The bytes that a token stands for, for clients that want log-probabilities.

A token may be a part of a character, so its text alone does not say what it is. Source of the spellings: the
``tokenizers`` library (decoders.ByteLevel, decoders.ByteFallback). Memory: none to speak of.
"""

from __future__ import annotations

import json
import re
from typing import Any

from conmoe_edge.serve.fewest_tokens import byte_alphabet

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "\u2581"


class TokenBytes:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = None if backend is None else backend.decoder
        kinds = "" if decoder is None else json.loads(decoder.__getstate__())
        self._alphabet = byte_alphabet() if "ByteLevel" in json.dumps(kinds) else {}

    def of(self, token: int) -> bytes:
        """Its bytes; none for a number without a token."""
        spelt = self._tokenizer.convert_ids_to_tokens(token)
        if spelt is None:
            return b""
        added = self._tokenizer.added_tokens_decoder.get(token)
        if added is not None:
            return str(added.content).encode("utf-8", "replace")
        if self._alphabet and all(character in self._alphabet for character in spelt):
            return bytes(self._alphabet[character] for character in spelt)
        byte = _BYTE.fullmatch(spelt)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return str(spelt).replace(_BLANK, " ").encode("utf-8", "replace")
