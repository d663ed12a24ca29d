"""What came of a tool as text: agents send pictures back as well, and cannot take them out of the conversation again.

A picture in a question is refused, since the answer would be about something that nobody saw. One that a tool gave
becomes a line that says so, to the model and, in a header, to the client. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from conmoe_edge.serve.http_errors import only_text

NO_TEXT = "[{kind} left out: only text can be read]"


def result_texts(value: Any, where: str, kinds: Collection[str], ignored: list[str]) -> list[str]:
    """The texts of a result: a text, or blocks, of which those of ``kinds`` have one.

    Args:
        value: as the client sent it.
        where: its place in the request.
        kinds: ``type`` of blocks with a text.
        ignored: gets the places of the others.

    Raises:
        ApiError: it is neither.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise only_text(where)
    texts = []
    for index, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise only_text(where)
        if kind not in kinds:
            ignored.append(f"{where}[{index}] ({kind})")
            texts.append(NO_TEXT.format(kind=kind[:40]))
            continue
        text = block.get("text")
        if not isinstance(text, str):
            raise only_text(where)
        texts.append(text)
    return texts
