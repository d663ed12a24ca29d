"""What ``bench --json`` measured of a package, read back. The file is foreign, so it is checked.

Raises ``UsageError``: not such a file, or one about another package.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.errors import UsageError

_MOST_BYTES = 16 << 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Spread(_Part):
    median: float = Field(gt=0, allow_inf_nan=False)


class _Decode(_Part):
    tokens_per_second: _Spread
    hit_rate: float | None = Field(ge=0, le=1)


class _Memory(_Part):
    used_bytes: int = Field(ge=0, le=1 << 53)
    budget_bytes: int = Field(ge=0, le=1 << 53)


class _Package(_Part):
    method: str
    rate: float
    prototypes: int
    slots: int = Field(ge=0)


class Measured(_Part):
    """As much of a report of ``bench`` as a page about the package shows."""

    package: _Package
    decode: _Decode
    memory: _Memory


def read_measured(path: Path, manifest: Manifest) -> Measured:
    """The report in ``path``, which must be about a package like this one."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} is no report of bench.", "it is far too large", _AGAIN)
        found = Measured.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", error.strerror or str(error), _AGAIN) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        why = f"{where}: {first['msg']}" if where else first["msg"]
        raise UsageError(f"{path} is no report of bench.", why[:200], _AGAIN) from None
    mine = (manifest.method, manifest.rate, len(manifest.prototypes))
    theirs = (found.package.method, found.package.rate, found.package.prototypes)
    if mine != theirs:
        raise UsageError(
            f"{path} is about another package.",
            f"it has {theirs[2]} prototypes by {theirs[0]!r}, this one {mine[2]} by {mine[0]!r}",
            _AGAIN,
        )
    return found


_AGAIN = "conmoe-edge bench DIR --json > speed.json, then --bench speed.json"
