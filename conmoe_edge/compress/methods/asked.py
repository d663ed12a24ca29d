"""A method by the name that a user gave, and whether the other levers go with it."""

from __future__ import annotations

from typing import Literal

from conmoe_edge.compress.methods import METHODS
from conmoe_edge.compress.methods.interface import Method
from conmoe_edge.errors import UsageError


def asked_method(name: str, scope: int | Literal["auto"], precision: str) -> tuple[Method, str]:
    """The method, and the precision to plan with: its own where it has only one.

    Raises:
        UsageError: there is no such method, or it cannot be had with this scope or precision.
    """
    if name not in METHODS:
        raise UsageError(
            f"{name!r} is not a method.", f"there are: {', '.join(METHODS)}", "--method conmoe"
        )
    method = METHODS[name]
    if (method.needs.target or method.within_layers) and scope not in (1, "auto"):
        raise UsageError(
            f"{name} shares prototypes within a layer only.",
            f"you asked for scopes of {scope} layers",
            "--scope 1, or --method conmoe",
        )
    own = method.precision
    if own is not None:
        if precision not in ("auto", own):
            raise UsageError(
                f"{name} cannot be stored in {precision}.",
                f"what it makes is {own}, and nothing else",
                f"leave --precision {precision} out, or take another --method",
            )
        return method, own
    makers = [one.name for one in METHODS.values() if one.precision == precision]
    if makers:
        raise UsageError(
            f"{name} cannot be stored in {precision}.",
            f"only {' and '.join(makers)} makes such records",
            f"--method {makers[0]}, or --precision auto",
        )
    return method, precision
