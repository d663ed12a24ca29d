"""Records that an expert may become, ordered by bytes, so that ``widths.choose`` can take one for every expert. Pure.

Several options may take the same bytes (pages), and which is best may differ from expert to expert. At every number of
bytes that some option takes stands the one with the least error there; the first of equals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conmoe_edge.compress.solvers.widths import choose, layer_curve


@dataclass(frozen=True, slots=True)
class Menu:
    """Of one layer.

    Attributes:
        sizes: bytes that options take, ascending, and before them what an expert takes that goes.
        curves: error of every expert at each of these, the first without it; infinite where it may not be.
        picks: the number of the option that stands there, -1 where an expert goes.
    """

    sizes: tuple[int, ...]
    curves: tuple[tuple[float, ...], ...]
    picks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        nbytes: Sequence[int],
        errors: Sequence[Sequence[float]],
        nothing: Sequence[float],
        gone: int = 0,
    ) -> Menu:
        """Put together.

        Args:
            nbytes: of every option.
            errors: of every expert, in every option; infinite where it may not have it, but not in the last.
            nothing: of every expert, the error without it; infinite where it has to stay.
            gone: bytes that an expert takes without it; fewer than any option.
        """
        sizes = sorted(set(nbytes))
        curves, picks = [], []
        for own, without in zip(errors, nothing, strict=True):
            best = [
                min((own[at], at) for at, size in enumerate(nbytes) if size == wanted)
                for wanted in sizes
            ]
            curves.append((without, *(error for error, _ in best)))
            picks.append((-1, *(at for _, at in best)))
        return cls((gone, *sizes), tuple(curves), tuple(picks))

    @property
    def least(self) -> list[int]:
        """The first place of every expert that it may have."""
        return [next(at for at, error in enumerate(row) if error < math.inf) for row in self.curves]

    def chosen(self, room: int) -> list[int] | None:
        """The option of every expert, -1 for none, in so many bytes; ``None`` where the least is more."""
        least = self.least
        if sum(self.sizes[one] for one in least) > room:
            return None
        places = choose(self.curves, self.sizes, room, least)
        return [row[at] for row, at in zip(self.picks, places, strict=True)]

    def curve(self, unit: int, units: int) -> tuple[float, ...]:
        """``widths.layer_curve``, of menus in which every expert may have everything."""
        return layer_curve(self.curves, self.sizes, unit, units)
