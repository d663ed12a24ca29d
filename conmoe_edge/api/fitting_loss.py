"""``fit --max-loss``: the smallest package whose held-out loss rises by no more, found by whole fits.

Nothing short of a fit says what a package will lose, so some are made, each with another number of bits a weight, and
what their receipts measured says where to look next: the logarithm of the rise is taken to be straight in the bits
between two measured ones, and as steep as on the demo model before there are two. It ends when the rise is close below
what is allowed, when two neighbours are close enough, or after ``MOST_FITS``. The smallest that kept to it is moved to
its place; the others are deleted. Until then they lie beside it, in ``.NAME.max-loss``, where a fit that was stopped
goes on.

A rise below ``NOISE`` nats cannot be told from none on the held-out text, so the divergence counts for it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conmoe_edge.api.fitting import FitReport, fit
from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME
from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.errors import OutputExists, UsageError
from conmoe_edge.plan.levers import FREE
from conmoe_edge.plan.priors import DEMO
from conmoe_edge.plan.request import PlanRequest, check_alone

MOST_FITS = 6
NOISE = 0.002
LEAST_BITS, MOST_BITS = 1.0, 8.0
"""Where packages are looked for."""
_CLOSE = 0.85
"""A rise of this share of what is allowed is close enough."""
_LEAST_SLOPE = 0.2
"""By which the logarithm of the loss falls with a bit, at the least."""
_TINY = 1e-7
_REPLACED = "replaced"
"""Name of the package that was at the place before, until the new one is there."""
_STEP = 0.1
"""Bits between two fits that are close enough."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One fit: the bits that were asked for, and the rise that was measured, nats a token."""

    bits: float
    rise: float


def fit_within_loss(
    model: str,
    out: str | Path,
    max_loss: float,
    request: PlanRequest | None = None,
    *,
    overwrite: bool = False,
    **options: Any,
) -> tuple[FitReport, tuple[Tried, ...]]:
    """Fit until the smallest package is found.

    Args:
        model, out, request, overwrite, options: as of ``fit``; nothing that fixes bits, rate or widths.
        max_loss: nats a token that the held-out loss may rise.

    Returns:
        The report of the package that is at ``out``, and all fits in their order.

    Raises:
        UsageError: ``max_loss`` is no rise, something is asked that fixes the bytes, or no package keeps to it.
        OutputExists: ``out`` is there.
    """
    request, place = request or PlanRequest(), Path(out)
    _check(request, max_loss)
    folder = place.parent / f".{place.name}.max-loss"
    put_back(place, folder)
    if place.exists() and not overwrite:
        raise OutputExists(
            f"{place} is there already.", "", "--overwrite to replace it, or another --out DIR"
        )
    if place.exists() and not (place / MANIFEST_NAME).is_file():
        raise OutputExists(f"{place} is there and is no package.", "", "another --out DIR")

    def fitted(bits: float) -> tuple[FitReport, float]:
        asked = replace(request, bits=bits, precision=FREE)
        report = fit(model, folder / f"{bits:.2f}", asked, overwrite=True, **options)
        return report, rise_of(report.receipt)

    found, tried = search(max_loss, fitted)
    if found is None:
        durable.remove_tree(folder)
        best = min(one.rise for one in tried)
        raise UsageError(
            f"No package of {model} was found whose loss rises by no more than {max_loss:g} nats.",
            f"{len(tried)} were made, up to {max(one.bits for one in tried):.2f} bits a weight; "
            f"the least rise was {best:.4f}",
            f"--max-loss {math.ceil(best * 1e4) / 1e4:g}",
        )
    put(found.out, place, folder)
    return replace(found, out=place), tuple(tried)


def put(package: Path, place: Path, folder: Path) -> None:
    """Move a package out of ``folder`` to its ``place``, in the place of what is there; ``folder`` is deleted."""
    if place.exists():
        durable.replace(place, folder / _REPLACED)
    durable.replace(package, place)
    durable.remove_tree(folder)


def put_back(place: Path, folder: Path) -> None:
    """After a ``put`` that was cut short: what it had taken away is at ``place`` again, where nothing else is yet."""
    taken = folder / _REPLACED
    if not taken.exists():
        return
    if place.exists():
        durable.remove_tree(taken)
    else:
        durable.replace(taken, place)


def rise_of(receipt: dict[str, Any]) -> float:
    """What a receipt says that was lost: the rise of the loss, the divergence where that is within the noise."""
    rise = float(receipt["loss_consolidated"]) - float(receipt["loss_original"])
    return rise if rise > NOISE else max(rise, float(receipt["kl"]))


def search(
    wanted: float, fitted: Callable[[float], tuple[FitReport, float]]
) -> tuple[FitReport | None, list[Tried]]:
    """The report of the smallest that keeps to ``wanted``, ``None`` where none does, and all that were made."""
    best: FitReport | None = None
    tried: list[Tried] = []
    low, high = LEAST_BITS, MOST_BITS  # what is known to lose too much, and to keep to it
    above: Tried | None = None
    below: Tried | None = None
    bits = _guess(wanted)
    while len(tried) < MOST_FITS:
        report, rise = fitted(bits)
        one = Tried(bits, rise)
        tried.append(one)
        if rise <= wanted:
            best, above, high = report, one, bits
            if rise >= _CLOSE * wanted:
                break
        else:
            below, low = one, bits
        if high - low < _STEP:
            break
        bits = _next(wanted, tried, above, below, low, high)
    return best, tried


def _guess(wanted: float) -> float:
    """Bits with which the demo model loses so much, in its range."""
    bits, divergence = min(DEMO, key=lambda row: abs(math.log(row[1] / wanted)))
    return _within(bits + math.log(divergence / wanted) / _slope(), LEAST_BITS, MOST_BITS)


def _slope() -> float:
    """By how much the logarithm of the loss falls with a bit, on the demo model."""
    (first, more), (last, less) = DEMO[0], DEMO[-1]
    return math.log(more / less) / (last - first)


def _next(
    wanted: float,
    tried: list[Tried],
    above: Tried | None,
    below: Tried | None,
    low: float,
    high: float,
) -> float:
    aim, last = wanted * (1 + _CLOSE) / 2, tried[-1]
    pair = (below, above) if above and below else tuple(tried[-2:])
    slope = _slope()
    if len(pair) == 2:
        few, many = sorted((one for one in pair if one), key=lambda one: one.bits)
        fall = math.log(max(few.rise, _TINY) / max(many.rise, _TINY)) / (many.bits - few.bits)
        slope = max(_LEAST_SLOPE, fall)
    bits = last.bits + math.log(max(last.rise, _TINY) / aim) / slope
    margin = min(_STEP / 2, (high - low) / 4)
    return _within(bits, low + margin if below else low, high - margin if above else high)


def _within(bits: float, low: float, high: float) -> float:
    return round(min(high, max(low, bits)), 2)


def _check(request: PlanRequest, max_loss: float) -> None:
    if not 0.0 < max_loss < math.inf:
        raise UsageError(
            f"--max-loss {max_loss:g} is no rise of a loss.",
            "it is nats a token",
            "--max-loss 0.01",
        )
    fixed = {
        "--bits": request.bits,
        "--rate": request.forced_rate,
        "--precision": request.precision if request.precision not in ("auto", FREE) else None,
        "--widths": "equal" if request.equal else None,
        "--min-speed": request.min_speed,
        "--for": request.engine,
    }
    why = "it looks for the fewest bytes that keep to it, by fits with several numbers of bits"
    check_alone(f"--max-loss {max_loss:g}", fixed, why, "--max-loss")
