"""``machine.json``: what was measured of the machine that made a package, beside the package.

The same fit gives the same bytes, whatever the machine was doing. So ``conmoe.json`` holds what was decided, and this
file, which the manifest does not list, what rests on a stopwatch: bandwidths, free memory, the speeds expected from
them, and whether reading ahead pays at these rates. A package without it runs as well, says nothing of speed and reads
nothing ahead. A file that was written for another manifest says nothing of this one and counts as absent.

It may come from anywhere, so all of it is checked. Peak memory: the file, a few kilobytes. Raises ``PackageError``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conmoe_edge.checkpoint.format.manifest import (
    MANIFEST_NAME,
    CacheSettings,
    Manifest,
    PrefetchSettings,
)
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_json
from conmoe_edge.checkpoint.fs.contained import is_there, read_inside
from conmoe_edge.checkpoint.package.manifest_schema import CacheJson, Count, PrefetchJson
from conmoe_edge.errors import CheckpointError, PackageError
from conmoe_edge.plan.plan import Plan

MACHINE_FILE = "machine.json"
SCHEMA_VERSION = 1
_MOST_BYTES = 1 << 20

_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BudgetFigures(_Strict):
    """The fields of ``Budget`` that are of a machine and an hour."""

    host_bytes: Count | None
    device_bandwidth: _Rate
    link_bandwidth: _Rate
    disk_bandwidth: _Rate
    in_use_by_others: Count
    here: Annotated[str, Field(max_length=1000)]


class MachineJson(_Strict):
    """The whole file; ``manifest`` is the SHA-256 of the ``conmoe.json`` it belongs to."""

    schema_version: Literal[1]
    manifest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    budget: BudgetFigures
    tokens_per_second: Annotated[list[_Rate], Field(max_length=1 << 10)]
    cache: Annotated[list[CacheJson], Field(max_length=1 << 16)]
    prefetch: PrefetchJson | None


def save_machine_file(
    folder: Path, manifest: WrittenFile, plan: Plan, tuned: Manifest
) -> WrittenFile | None:
    """Write what ``plan`` and ``tuned`` have beyond the package in ``folder``; ``None`` where nothing was measured.

    Args:
        folder: of the package.
        manifest: its ``conmoe.json``.
        plan: with its measurements.
        tuned: the manifest with cache and prefetch for the measured rates.
    """
    if not plan.budget.measured:
        return None
    prefetch = None
    if tuned.prefetch is not None:
        recall = {str(layer): share for layer, share in tuned.prefetch.recall.items()}
        prefetch = {**asdict(tuned.prefetch), "recall": recall}
    value = {
        "schema_version": SCHEMA_VERSION,
        "manifest": manifest.sha256,
        "budget": {name: getattr(plan.budget, name) for name in BudgetFigures.model_fields},
        "tokens_per_second": [one.tokens_per_second for one in plan.candidates],
        "cache": [{**asdict(one), "quotas": list(one.quotas)} for one in tuned.cache],
        "prefetch": prefetch,
    }
    return write_json(folder / MACHINE_FILE, value)


def with_machine_file(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of the package in ``folder`` with what was measured when it was made: its plan has rates and
    speeds, its cache and prefetch are those for these rates.

    Raises:
        PackageError: there is such a file and it is damaged.
    """
    if not is_there(folder, MACHINE_FILE):
        return manifest
    try:
        found = MachineJson.model_validate_json(read_inside(folder, MACHINE_FILE, _MOST_BYTES))
        of = hashlib.sha256(read_inside(folder, MANIFEST_NAME)).hexdigest()
    except CheckpointError as error:
        raise PackageError(error.what, error.why, _without(folder)) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise _damaged(folder, f"{where}: {first['msg']}"[:200]) from None
    if found.manifest != of:
        return manifest
    cache, prefetch = manifest.cache, manifest.prefetch
    if found.cache:
        if len(found.cache) != len(manifest.layouts):
            raise _damaged(folder, "the cache settings are not one a layout")
        cache = tuple(
            CacheSettings(**{**one.model_dump(), "quotas": tuple(one.quotas)})
            for one in found.cache
        )
    if found.prefetch is not None:
        if prefetch is None:
            raise _damaged(folder, "prototypes are read ahead, but the package predicts none")
        prefetch = PrefetchSettings(**found.prefetch.model_dump())
    return replace(manifest, plan=_figures_in(manifest.plan, found), cache=cache, prefetch=prefetch)


def _figures_in(plan: Mapping[str, Any], found: MachineJson) -> dict[str, Any]:
    """The plan's JSON with its figures; as it was where this version does not know its shape."""
    budget, candidates, chosen = (plan.get(key) for key in ("budget", "candidates", "chosen"))
    if not (isinstance(budget, dict) and isinstance(chosen, dict) and isinstance(candidates, list)):
        return dict(plan)
    speeds = found.tokens_per_second
    if len(speeds) != len(candidates) or chosen not in candidates:
        return dict(plan)
    timed = [
        {**one, "tokens_per_second": speed} for one, speed in zip(candidates, speeds, strict=True)
    ]
    return {
        **plan,
        "budget": {**budget, **found.budget.model_dump()},
        "candidates": timed,
        "chosen": timed[candidates.index(chosen)],
    }


def _damaged(folder: Path, why: str) -> PackageError:
    return PackageError(f"{folder / MACHINE_FILE} is damaged.", why, _without(folder))


def _without(folder: Path) -> str:
    return f"Delete {folder / MACHINE_FILE}: the package runs without it, and bench measures anew."
