"""What of the fast path a loaded model has, and what has answered for its tokens since."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import nn

Live = Literal["layer", "block", "attention", "none"]
_WORDS = {
    "layer": "in one call",
    "block": "in two calls",
    "attention": "with attention in one call",
}


class FastPathWarning(UserWarning):
    """A model could have the fast path, and has not."""


@cache
def warn_once(text: str) -> None:
    """Give the warning ``text``, the first time that there is reason to."""
    warnings.warn(text, FastPathWarning, stacklevel=3)


def warn_of_another_result(module: nn.Module) -> None:
    """``module`` is left to transformers, because the operator has computed something else for a token."""
    name = type(module).__name__
    warn_once(
        f"{name}: the operator's result is not transformers', so single tokens take transformers' steps"
    )


@dataclass(frozen=True, slots=True)
class LayerPath:
    """How a decoder layer takes a single token.

    Attributes:
        index: of the layer.
        live: ``layer``: all of it in one call; ``block``: attention and both norms in one call, the rest as the model
            has it; ``attention``: attention alone; ``none``: transformers' way, with native products and norms.
        router: whether its router is one call.
        reason: why it is not in one call; empty where it is.
    """

    index: int
    live: Live
    router: bool
    reason: str


@dataclass(slots=True)
class Served:
    """Counts of single tokens since the model was loaded.

    Attributes:
        tokens: forwards of the model with one token.
        layers, blocks, attention: decoder layers that answered so, over all of those tokens.
        together: decoder layers that answered so in steps that several answers shared, over all of their tokens.
    """

    tokens: int = 0
    layers: int = 0
    blocks: int = 0
    attention: int = 0
    together: int = 0


@dataclass(frozen=True, slots=True)
class FastPathReport:
    """Which decoder layers take single tokens through the operator.

    Attributes:
        layers: one entry a decoder layer.
        reason: why no layer does; empty where one does.
        apart: why several answers do not share the steps of their tokens; empty where they do.
        around: why the steps of a token around its layers are the model's own; empty where they are not
            (``single_step.py``).
        together: what takes such steps (``together.py``); ``None`` where they do not.
    """

    layers: tuple[LayerPath, ...]
    reason: str = ""
    apart: str = ""
    around: str = ""
    served: Served = field(default_factory=Served, compare=False, repr=False)
    together: Any = field(default=None, compare=False, repr=False)

    def live(self) -> dict[str, int]:
        """Decoder layers that have answered for single tokens, by the way that they took: ``tokens`` of them, and
        ``layer``, ``together`` (in a step that several answers shared), ``block``, ``attention`` and ``transformers``,
        which add up to tokens times layers.

        The first token of a layer goes transformers' way, to be compared; so does everything after a hook was put on a
        part, or a part was exchanged. A count of ``transformers`` that keeps growing means that the fast path is off.
        """
        now = self.served
        rest = now.tokens * len(self.layers) - now.layers - now.blocks - now.attention
        rest -= now.together
        return {
            "tokens": now.tokens,
            "layer": now.layers,
            "together": now.together,
            "block": now.blocks,
            "attention": now.attention,
            "transformers": max(0, rest),
        }

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.reason:
            return self.reason
        ways = Counter(layer.live for layer in self.layers)
        total = len(self.layers)
        if ways["layer"] == total:
            return f"native, {total} of {total} layers in one call"
        why = "; ".join(dict.fromkeys(one.reason for one in self.layers if one.reason))
        found = [
            f"{ways[way]} of {total} layers {word}" for way, word in _WORDS.items() if ways[way]
        ]
        what = f"native, {', '.join(found)}" if found else "native products only"
        return f"{what}: {why}"

    def to_json(self) -> dict[str, Any]:
        """Plain values: the summary, every layer, and the counts."""
        return {
            "summary": self.summary,
            "layers": [
                {"index": one.index, "live": one.live, "router": one.router, "reason": one.reason}
                for one in self.layers
            ],
            "apart": self.apart,
            "around": self.around,
            "served": self.live(),
        }
