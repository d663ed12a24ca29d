"""What the router asked for, token by token: the history that cache decisions are tried on. No torch, no files.

``fit`` keeps the router's choices of some calibration sequences; with the reassignment map they become
requests for prototypes, and those are what a cache sees.

Memory: a reference for every choice (4096 tokens, 16 layers, top-8: about 10 MB while it is held).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

MOST_TOKENS = 4096
"""Longest trace that a package carries."""

Row = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Router slots as they were chosen.

    Attributes:
        layers: decoder layers, ascending.
        sequences: length of each sequence in tokens; the sequences follow one another.
        slots: [layer][token] -> the router slots of the token, highest gate first or as the router gave them;
            a number that is no slot of the layer is a skip mark.
    """

    layers: tuple[int, ...]
    sequences: tuple[int, ...]
    slots: tuple[tuple[Row, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens over all sequences."""
        return sum(self.sequences)


@dataclass(frozen=True, slots=True)
class PrototypeTrace:
    """The same in prototype numbers.

    Attributes:
        layers, sequences: as in ``RoutingTrace``.
        asked: [layer][token] -> distinct prototype numbers in ascending order; may be empty.
    """

    layers: tuple[int, ...]
    sequences: tuple[int, ...]
    asked: tuple[tuple[Row, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens over all sequences."""
        return sum(self.sequences)

    def decode(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Row]]:
        """``(position of the layer, prototypes)`` in the order of a decode: token by token, layers ascending.

        ``start`` and ``stop`` are tokens. Requests for nothing are left out.
        """
        end = self.tokens if stop is None else stop
        for rows in zip(*(layer[start:end] for layer in self.asked), strict=True):
            for position, row in enumerate(rows):
                if row:
                    yield position, row

    @property
    def requests(self) -> int:
        """Prototypes that were asked for, over all layers and tokens."""
        return sum(len(row) for layer in self.asked for row in layer)

    def every(self, step: int) -> PrototypeTrace:
        """Each ``step``-th sequence, whole, from the first on."""
        ends = list(accumulate(self.sequences))
        spans = [slice(e - n, e) for n, e in zip(self.sequences, ends, strict=True)][::step]
        asked = tuple(tuple(row for span in spans for row in layer[span]) for layer in self.asked)
        return PrototypeTrace(self.layers, self.sequences[::step], asked)

    def only(self, keep: Sequence[bool]) -> PrototypeTrace:
        """The requests for prototypes with ``keep[number]``; the others are taken out of every row."""
        asked = tuple(
            tuple(tuple(n for n in row if keep[n]) for row in layer) for layer in self.asked
        )
        return PrototypeTrace(self.layers, self.sequences, asked)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a predictor said about some tokens of a trace, before the layer's router ran.

    Attributes:
        tokens: which tokens, ascending.
        ranked: [position of the layer][i] -> the layer's prototypes for ``tokens[i]``, the likeliest first; empty
            where nothing predicts a layer.
    """

    tokens: tuple[int, ...]
    ranked: tuple[tuple[Row, ...], ...]


def to_prototypes(trace: RoutingTrace, numbers: Mapping[int, Sequence[int]]) -> PrototypeTrace:
    """Send every router slot to its prototype; slots that meet on one prototype ask for it once.

    Args:
        trace: the router's choices.
        numbers: layer -> prototype number of every router slot, -1 where a slot has none.
    """
    asked = []
    for layer, rows in zip(trace.layers, trace.slots, strict=True):
        known = {slot: number for slot, number in enumerate(numbers[layer]) if number >= 0}
        asked.append(
            tuple(tuple(sorted({known[slot] for slot in row if slot in known})) for row in rows)
        )
    return PrototypeTrace(trace.layers, trace.sequences, tuple(asked))
