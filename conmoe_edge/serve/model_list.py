"""Models as ``/v1/models`` lists them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def models(model: str, aliases: Sequence[str], created: int, *, loaded: bool) -> dict[str, Any]:
    """``GET /v1/models``: one model, under each of its names."""
    data = [model_json(name, created, loaded=loaded) for name in (model, *aliases)]
    return {"object": "list", "data": data}


def model_json(model: str, created: int, *, loaded: bool) -> dict[str, Any]:
    """``GET /v1/models/NAME``."""
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "conmoe-edge",
        "loaded": loaded,
    }
