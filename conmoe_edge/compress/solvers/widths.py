"""How many neurons each expert of a layer keeps: where a neuron's bytes are worth most. Pure.

For every expert e the squared error E_e(w) is known for a few widths w, 0 (it goes) and all neurons
among them. Widths are chosen such that the sum of errors is least in the bytes there are: from all
whole, again and again the step that costs least error a byte, over the lower convex hull of each
expert's (bytes, error), which is optimal up to the last step. What is left of the room then goes where
it saves most.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

Curve = Sequence[float]
"""Errors of one expert, one for every width, falling to 0; of records of several kinds (``record_menu.py``) the larger
one may lose more.
"""


def choose(
    curves: Sequence[Curve], sizes: Sequence[int], room: int, least: Sequence[int] = ()
) -> list[int]:
    """The position of every expert's width; ties go to the last expert, so that the first stays.

    Args:
        curves: errors of every expert at every width.
        sizes: bytes of a record of every width, ascending; ``sizes[0]`` is what an expert takes that goes.
        room: bytes in all. The widest expert keeps at least one step where nothing else fits.
        least: position that an expert keeps at the least, where the room allows; 0 by default.
    """
    floors = list(least) or [0] * len(curves)
    if sum(sizes[one] for one in floors) > room:
        floors = [0] * len(curves)
    chosen = [len(sizes) - 1] * len(curves)
    for expert, place, slope in _steps(curves, sizes, floors):
        if slope >= 0 and sum(sizes[one] for one in chosen) <= room:
            break
        chosen[expert] = place
    left = room - sum(sizes[one] for one in chosen)
    while True:
        gains = [
            ((curve[now] - curve[wider]) / (sizes[wider] - sizes[now]), -expert, wider)
            for expert, (curve, now) in enumerate(zip(curves, chosen, strict=True))
            for wider in range(now + 1, len(sizes))
            if sizes[wider] - sizes[now] <= left and curve[wider] <= curve[now]
        ]
        if not gains:
            break
        _, negative, wider = max(gains)
        left -= sizes[wider] - sizes[chosen[-negative]]
        chosen[-negative] = wider
    if not any(chosen):
        chosen[max(range(len(curves)), key=lambda e: (curves[e][0], -e))] = 1
    return chosen


def layer_curve(
    curves: Sequence[Curve], sizes: Sequence[int], unit: int, units: int
) -> tuple[float, ...]:
    """The sum of errors that is left in 0, 1, ... ``units`` times ``unit`` bytes; its steps never grow."""
    now = len(sizes) - 1
    places = [now] * len(curves)
    nbytes, error = [sizes[now] * len(curves)], [sum(curve[now] for curve in curves)]
    for expert, place, slope in _steps(curves, sizes, [0] * len(curves)):
        less = sizes[places[expert]] - sizes[place]
        nbytes.append(nbytes[-1] - less)
        error.append(error[-1] + slope * less)
        places[expert] = place
    nbytes.reverse()
    error.reverse()
    found = []
    for count in range(units + 1):
        wanted = count * unit
        after = bisect_left(nbytes, wanted)
        if after == len(nbytes):
            found.append(error[-1])
        elif nbytes[after] == wanted or after == 0:
            found.append(error[after])
        else:
            share = (wanted - nbytes[after - 1]) / (nbytes[after] - nbytes[after - 1])
            found.append(error[after - 1] + share * (error[after] - error[after - 1]))
    return tuple(found)


def _steps(
    curves: Sequence[Curve], sizes: Sequence[int], floors: Sequence[int]
) -> list[tuple[int, int, float]]:
    """(expert, the width that it falls to, error a byte), the cheapest first, every expert's own in falling order."""
    found = []
    for expert, (curve, floor) in enumerate(zip(curves, floors, strict=True)):
        now = len(sizes) - 1
        while now > floor:
            slope, place = min(
                ((curve[to] - curve[now]) / (sizes[now] - sizes[to]), to)
                for to in range(floor, now)
            )
            found.append((slope, -expert, len(sizes) - place, place))
            now = place
    return [(-negative, place, slope) for slope, negative, _, place in sorted(found)]
