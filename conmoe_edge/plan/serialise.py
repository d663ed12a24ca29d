"""A plan as plain JSON and back: for ``--json``, for the manifest, and for a run that goes on
later.

``plan_from_json`` reads what may have come from disk, so it checks every field and raises
``PackageError``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from conmoe_edge.errors import PackageError
from conmoe_edge.plan.plan import Plan

SCHEMA_VERSION = 1
_DERIVED = ("schema_version", "device_bytes_used")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Dicts, lists, numbers and text only; sizes in bytes, shares between 0 and 1."""
    return {
        "schema_version": SCHEMA_VERSION,
        "device_bytes_used": plan.device_bytes_used,
        **_plain(asdict(plan)),
    }


def plan_from_json(value: dict[str, Any]) -> Plan:
    """The plan that ``plan_to_json`` wrote."""
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise PackageError(
            f"The plan has schema version {version!r}.",
            f"this version of conmoe-edge reads {SCHEMA_VERSION}",
            "Use the version that wrote it, or run fit again",
        )
    fields = {key: one for key, one in value.items() if key not in _DERIVED}
    try:
        return TypeAdapter(Plan).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(one) for one in first["loc"])
        raise PackageError(
            "The plan in the manifest is damaged.", f"{where}: {first['msg']}", "Run fit again"
        ) from error


def _plain(value: Any) -> Any:
    """Tuples become lists, as they do in JSON text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
