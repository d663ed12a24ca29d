"""A tokenizer that looks at the length of a text before it tokenises it.

What a chat template makes of messages is only known when it is there, so the check stands between the template and the
tokenizer: ``limited`` gives a tokenizer that is the same in everything else, whoever calls it. Memory: none, it shares
the tokenizer's tables.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any


def limited(tokenizer: Any, check: Callable[[str], None]) -> Any:
    """``tokenizer``, with ``check`` called before each text; what it raises leaves the call."""
    one = copy.copy(tokenizer)
    one.__class__ = _limited_class(type(tokenizer))
    one.__dict__["_conmoe_check"] = check
    return one


@cache
def _limited_class(kind: type) -> type:
    base: Any = kind

    class Limited(base):
        """As its base, with a look at every text."""

        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            _look(self, text)
            return base.__call__(self, text, *args, **kwargs)

        def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            _look(self, text)
            return base.encode(self, text, *args, **kwargs)

    Limited.__name__ = kind.__name__
    return Limited


def _look(tokenizer: Any, text: Any) -> None:
    for one in [text] if isinstance(text, str) else text or ():
        if isinstance(one, str):
            tokenizer.__dict__["_conmoe_check"](one)
