"""The levers of a package that another engine runs: what it needs is forced, and what was asked otherwise refused.

vLLM (``integrations/vllm``) holds every prototype of a layer in the model's own number format, on the device, all the
time, as one tensor. So precision is the source's, every prototype counts as resident and has as many neurons as the
others, dense weights stay as they are, and scopes are single layers. Fewer experts are then the only lever.
Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conmoe_edge.errors import UsageError

ENGINES = ("vllm",)

_FORCED: Mapping[str, Mapping[str, Any]] = {
    "vllm": {
        "scope": 1,
        "precision": "source",
        "dense_precision": "source",
        "min_resident": 1.0,
        "widths": "equal",
    }
}
_FREE: Mapping[str, tuple[Any, ...]] = {
    "scope": ("auto",),
    "precision": ("auto", "bf16"),
    "dense_precision": (),
    "min_resident": (None,),
    "widths": ("free",),
}
_WHY = {
    "scope": "layers that share prototypes would have to share an engine's memory",
    "precision": "vLLM holds prototypes in the model's own number format, so fewer bits would save no memory there",
    "dense_precision": "vLLM reads dense weights as the model's own",
    "widths": "vLLM holds the prototypes of a layer as one tensor",
    "min_resident": "vLLM keeps every prototype on the device",
}


def levers_for(engine: str, levers: Mapping[str, Any]) -> dict[str, Any]:
    """The levers with what ``engine`` needs.

    Args:
        engine: one of ``ENGINES``.
        levers: what was asked, by the names that ``conmoe_edge.plan`` has for them.

    Raises:
        UsageError: something else was asked of a lever that is forced.
    """
    found = dict(levers)
    for name, forced in _FORCED[engine].items():
        asked = levers[name]
        if asked != forced and asked not in _FREE[name]:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} {asked} does not go with --for {engine}.",
                _WHY[name],
                f"leave out {flag}, or leave out --for {engine}",
            )
        if asked != "bf16":
            found[name] = forced
    return found
