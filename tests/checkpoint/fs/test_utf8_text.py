"""Text of users: a byte order mark is no text, and what is no UTF-8 is named."""

import codecs

import pytest

from conmoe_edge.checkpoint.fs.utf8_text import decode_utf8


def test_a_byte_order_mark_is_no_text() -> None:
    assert decode_utf8(codecs.BOM_UTF8 + "é".encode()) == "é"
    assert decode_utf8(b"") == ""


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"caf\xe9 ok", "byte 3 "),
        (codecs.BOM_UTF8 + b"caf\xe9 ok", "byte 6 "),
        ("hé".encode("utf-16"), "UTF-16"),
        ("hé".encode("utf-32"), "UTF-32"),
    ],
)
def test_what_is_no_utf8_is_named(raw: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode_utf8(raw)
