"""A loaded package is neither copied nor pickled: its experts lie in files, cache slots and threads, not in parameters.

Without a word of ours ``copy.deepcopy`` fails somewhere inside of a lock or a memory map, and ``pickle`` at a hook.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from conmoe_edge.errors import UsageError


def refuse_copies(model: nn.Module, folder: Path) -> None:
    """Let ``copy.copy``, ``copy.deepcopy`` and ``pickle`` of ``model`` say how another one is had."""

    def refuse(*_args: Any) -> NoReturn:
        raise UsageError(
            "A loaded package cannot be copied or pickled.",
            "its experts lie in files and cache slots, not in the parameters of the model",
            f"load it once more: conmoe_edge.load({str(folder)!r}); other processes load it themselves",
        )

    for name in ("__copy__", "__deepcopy__", "__reduce_ex__"):
        setattr(model, name, refuse)
