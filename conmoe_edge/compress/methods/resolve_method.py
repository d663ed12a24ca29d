"""A method by the name that a user gave, or the default, and whether the other levers go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.methods.interface import Method
from conmoe_edge.errors import UsageError
from conmoe_edge.plan.levers import FREE

DEFAULT_METHOD = "auto"
"""What ``fit`` and ``plan`` take where no method is named and layers do not share prototypes."""

_DEFAULT_WITH_SCOPE = "conmoe"


@dataclass(frozen=True, slots=True)
class Asked:
    """The method, the precision to plan with (its own where it has only one), and a sentence where
    the default gave way."""

    method: Method
    precision: str
    note: str = ""


def asked_method(name: str | None, scope: int | Literal["auto"], precision: str) -> Asked:
    """What is meant.

    Raises:
        UsageError: there is no such method, or it cannot be had with this scope or precision.
    """
    shared = scope not in (1, "auto")
    note = ""
    if name is None:
        name = DEFAULT_METHOD
        if shared and _within_layers(METHODS[name]):
            note = (
                f"{name} shares prototypes within a layer only, so scopes of {scope} layers "
                f"are consolidated with {_DEFAULT_WITH_SCOPE}"
            )
            name = _DEFAULT_WITH_SCOPE
    if name not in METHODS:
        raise UsageError(
            f"{name!r} is not a method.",
            f"there are: {', '.join(METHODS)}",
            f"--method {DEFAULT_METHOD}",
        )
    method = METHODS[name]
    if shared and _within_layers(method):
        raise UsageError(
            f"{name} shares prototypes within a layer only.",
            f"you asked for scopes of {scope} layers",
            "--scope 1, or --method conmoe",
        )
    return Asked(method, _precision(method, precision), note)


def _within_layers(method: Method) -> bool:
    return method.needs.target or method.within_layers


def _precision(method: Method, precision: str) -> str:
    own = method.precision
    if precision == FREE and not method.trims:
        raise UsageError(
            f"{method.name} keeps whole experts in one number of bits.",
            "bits that each prototype is worth are what auto finds (--bits, --precision free)",
            "--method auto, or --precision q3",
        )
    if own is not None:
        if precision not in ("auto", own):
            raise UsageError(
                f"{method.name} cannot be stored in {precision}.",
                f"what it makes is {own}, and nothing else",
                f"leave --precision {precision} out, or take another --method",
            )
        return own
    makers = [one.name for one in METHODS.values() if one.precision == precision]
    if makers:
        raise UsageError(
            f"{method.name} cannot be stored in {precision}.",
            f"only {' and '.join(makers)} makes such records",
            f"--method {makers[0]}, or --precision auto",
        )
    return precision
