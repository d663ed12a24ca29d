"""Whether the modules of a model are still what they were: one look at all of them, where each part would have its own.

Between two tokens nothing is in the processor's caches, so what is looked at for every token is a few long lists, not
many small functions. Memory: a few addresses a module; nothing of the model is kept alive by them that is not part of
it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Fingerprint:
    """Of some modules: their children, tensors and where those lie, hooks, what stands in front of their ``forward``,
    and that they are not training.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """As they are now."""
        own = [vars(one) for one in modules]
        self._hooks = [
            one[name] for one in own for name in ("_forward_hooks", "_forward_pre_hooks")
        ]
        self._children = [
            (one["_modules"], tuple(one["_modules"].values())) for one in own if one["_modules"]
        ]
        self._fronts = [(one, one.get("forward")) for one in own]
        self._tables: list[dict[str, Any]] = []
        self._names: list[str] = []
        for one in own:
            for kind in ("_parameters", "_buffers"):
                there = [name for name, tensor in one[kind].items() if tensor is not None]
                self._tables += [one[kind]] * len(there)
                self._names += there
        self._places = self._now()

    def same(self) -> bool:
        """Whether nothing has changed."""
        if any(self._hooks):
            return False
        for children, were in self._children:
            if tuple(children.values()) != were:  # modules are equal where they are the same
                return False
        for own, front in self._fronts:
            if own.get("forward") is not front or own["training"]:
                return False
        try:
            return self._now() == self._places
        except (KeyError, AttributeError):  # a tensor is gone
            return False

    def _now(self) -> list[int]:
        found: list[Tensor] = [
            table[name] for table, name in zip(self._tables, self._names, strict=True)
        ]
        return [one.data_ptr() for one in found]
