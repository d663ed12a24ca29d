"""A digest of the Python source that a class of transformers computes with.

``offload/fastpath/supported.py`` lists classes with the digests of the code that the operator reproduces. A class whose
code has changed has another digest, and is left to transformers.

Pure, but for reading source files.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

_BASES = ("torch.", "builtins", "transformers.modeling_layers")
"""Modules of base classes that are not read: torch's own, and transformers' wrapper for training."""
_TRANSPARENT = ("transformers.modeling_layers", "transformers.utils.deprecation")
"""Modules whose wrappers around a ``forward`` change nothing in a call for inference with the names of today."""
_UNUSED = frozenset(("eager_attention_forward",))
"""Named by every attention, called only for another attention implementation than the one that is set here."""
_DOCSTRING = re.compile(r'\n\s+r?"""[^\0]*?"""')


def source_digest(kind: type) -> str:
    """16 hexadecimal digits for the methods of ``kind``, its bases and the functions of their modules that they call.

    The functions are those that the class has now, so a method that was exchanged gives another digest.

    Raises:
        OSError: a function has no source file.
    """
    found = hashlib.sha256()
    for base in kind.__mro__:
        if not base.__module__.startswith(_BASES):
            for name, method in sorted(_methods(base)):
                for text in _sources(method, set()):
                    found.update(f"{base.__qualname__}.{name}\n{text}\n".encode())
    return found.hexdigest()[:16]


def forward_digest(kind: type) -> str:
    """As ``source_digest``, of the ``forward`` of ``kind`` alone and without texts for readers: for classes of models,
    whose bases do much else. Models that compute in the same lines have the same digest.

    Raises:
        OSError: a function has no source file.
    """
    texts = [_DOCSTRING.sub("", text) for text in _sources(kind.forward, set())]  # pyright: ignore[reportAttributeAccessIssue]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(kind).items():
        method = getattr(value, "__func__", getattr(value, "fget", value))
        if callable(method) and not isinstance(method, type):
            yield name, method


def _sources(function: Callable[..., Any], seen: set[Any]) -> Iterator[str]:
    """The source of ``function`` and of what it calls, each once; of a wrapper around it the name."""
    while hasattr(function, "__wrapped__"):
        code = getattr(function, "__code__", None)
        scope = getattr(function, "__globals__", {}).get("__name__", "")
        if not scope.startswith(_TRANSPARENT):
            yield f"{scope}.{code.co_qualname if code else type(function).__qualname__}"
        function = function.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    if function in seen:
        return
    seen.add(function)
    yield inspect.getsource(function)
    code = getattr(function, "__code__", None)
    if code is None or function.__name__ == "__init__":
        return
    for name in sorted(_names(code) - _UNUSED):
        helper = function.__globals__.get(name)
        if isinstance(helper, FunctionType) and helper.__module__ == function.__module__:
            yield from _sources(helper, seen)


def _names(code: CodeType) -> set[str]:
    inner = [_names(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*inner)
