"""The levers of a package that another engine runs: what it needs is forced, and what was asked otherwise refused.

vLLM (``integrations/vllm``) holds every prototype of a layer in the model's own number format, on the device, all the
time, as one tensor. So precision is the source's, every prototype counts as resident and has as many neurons as the
others, dense weights stay as they are, and scopes are single layers. Fewer experts are then the only lever.
Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from conmoe_edge.errors import UsageError
from conmoe_edge.plan.request import PlanRequest

ENGINES = ("vllm", "hf", "gguf")
PLAIN = ("hf", "gguf")
"""Those that read plain checkpoints: every expert kept, one width for all (``plan/plain_widths.py``)."""
WHOLE = ("vllm",)
"""Those that read packages and hold every prototype on the device, so that one that does not fit is no package for
them (``plan/all_resident.py``)."""

_PLAIN_LEVERS: Mapping[str, Any] = {
    "scope": 1,
    "precision": "source",
    "dense_precision": "source",
    "kv_precision": "source",
    "min_resident": 1.0,
    "widths": "equal",
    "method": "auto",
}
_FORCED: Mapping[str, Mapping[str, Any]] = {
    "vllm": {
        "scope": 1,
        "precision": "source",
        "dense_precision": "source",
        "kv_precision": "source",
        "min_resident": 1.0,
        "widths": "equal",
    },
    "hf": _PLAIN_LEVERS,
    "gguf": _PLAIN_LEVERS,
}
_FREE: Mapping[str, tuple[Any, ...]] = {
    "scope": ("auto",),
    "precision": ("auto", "bf16"),
    "dense_precision": ("auto",),
    "kv_precision": ("auto",),
    "min_resident": (None,),
    "widths": ("free",),
    "method": (None,),
}
_WHY = {
    "scope": "layers that share prototypes would have to share an engine's memory",
    "method": "only auto keeps every expert and removes neurons",
    "precision": "vLLM holds prototypes in the model's own number format, so fewer bits would save no memory there",
    "dense_precision": "vLLM reads dense weights as the model's own",
    "kv_precision": "the engine keeps a key-value cache of its own",
    "widths": "vLLM holds the prototypes of a layer as one tensor",
    "min_resident": "vLLM keeps every prototype on the device",
}

_WHY_PLAIN = {
    "scope": "a plain checkpoint has an expert of its own for every router slot",
    "precision": "a plain checkpoint holds experts in the model's own number format",
    "dense_precision": "a plain checkpoint holds dense weights in the model's own number format",
    "kv_precision": "the engine keeps a key-value cache of its own",
    "widths": "a plain checkpoint has one width for all experts",
    "min_resident": "the engine keeps every expert in memory",
}


def request_for(engine: str, request: PlanRequest) -> PlanRequest:
    """The request with what ``engine``, one of ``ENGINES``, needs.

    Raises:
        UsageError: something else was asked of a lever that is forced.
    """
    changed = {}
    for name, forced in _FORCED[engine].items():
        asked = getattr(request, name)
        if asked != forced and asked not in _FREE[name]:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} {asked} does not go with --for {engine}.",
                _WHY_PLAIN.get(name, _WHY[name]) if engine in PLAIN else _WHY[name],
                f"leave out {flag}, or leave out --for {engine}",
            )
        if asked != "bf16" or engine in PLAIN:
            changed[name] = forced
    return replace(request, engine=engine, **changed)
