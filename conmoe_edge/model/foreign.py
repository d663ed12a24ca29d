"""Calls of transformers and tokenizers with what a stranger's file says: quiet, and with errors of ours.

Both check their input in ways of their own, with any exception (a KeyError for an unknown activation, a
ZeroDivisionError for no heads, a panic of a Rust library, which is no ``Exception`` at all). Only calls into a library
belong inside ``foreign``; what runs of our own code within passes its ``ConmoeError`` on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from conmoe_edge.errors import ConmoeError

_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit)


@contextmanager
def foreign(error_of: Callable[[str], ConmoeError]) -> Iterator[None]:
    """Turn whatever a library raises into ``error_of(its message in one line)``, and show nothing of what it prints.

    Raises:
        ConmoeError: what ``error_of`` makes, or what came from our own code.
        MemoryError: as it is.
    """
    try:
        with quiet():
            yield
    except (ConmoeError, MemoryError, *_OURS):
        raise
    except BaseException as error:
        # torch's own class, and what its CPU allocator raises, by their words: nothing here imports torch.
        if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
            raise
        raise error_of(one_line(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers logs errors only, shows no bars, and nobody warns."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """A library's message in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text[:200]
