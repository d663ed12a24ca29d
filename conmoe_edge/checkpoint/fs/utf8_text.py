"""Bytes of a user's text file or pipe to text: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs

_OTHERS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def decode_utf8(raw: bytes) -> str:
    """The text, without the mark that some editors put in front.

    Raises:
        ValueError: it is no UTF-8; its message says what it is, or which byte is wrong.
    """
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        for mark, name in _OTHERS:
            if raw.startswith(mark):
                raise ValueError(f"it begins like {name}") from error
        marked = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
        raise ValueError(f"byte {error.start + marked} does not belong there") from error
