"""What ``models`` knows: every name, what it leads to, what of it is on this disk, and what would fit here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conmoe_edge.checkpoint.sources.hub_cache import CachedModel, cached_models
from conmoe_edge.checkpoint.sources.locate import aliases
from conmoe_edge.checkpoint.sources.model_names import own_aliases, resolve
from conmoe_edge.errors import ConmoeError, UsageError

if TYPE_CHECKING:
    from conmoe_edge.api import PlanReport


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model.

    Attributes:
        name: an alias, or the hub id of a model that is only in the cache.
        target: what the alias leads to; the same as ``name`` without one.
        own: whether the alias is the user's own.
        here: ``folder`` (comes along, or is the user's), ``cached``, ``partly`` or ``absent``.
        nbytes: on this disk; ``None`` where it is not.
        report: the plan for the budget that was asked about.
        problem: why there is no plan, where one was wanted.
    """

    name: str
    target: str
    own: bool
    here: str
    nbytes: int | None
    report: PlanReport | None = None
    problem: ConmoeError | None = None


def gather_models() -> tuple[ModelRow, ...]:
    """Every alias, then what the cache holds beyond them; no socket, no weights."""
    cached, own = cached_models(), own_aliases()
    rows, named = [], set()
    for name, target in aliases().items():
        row, hub_id = _row(name, target, name in own, cached)
        rows.append(row)
        named.add(hub_id)
    for hub_id, model in cached.items():
        if hub_id not in named:
            rows.append(ModelRow(hub_id, hub_id, False, _state(model), model.nbytes))
    return tuple(rows)


def with_plans(
    rows: tuple[ModelRow, ...], budget: str, *, online: bool, tell: Callable[[str], None]
) -> tuple[ModelRow, ...]:
    """The rows, those that can be described with a plan for ``budget``; others as they are.

    Raises:
        UsageError: the budget is none.
    """
    planned = []
    for row in rows:
        if row.here not in ("folder", "cached") and not online:
            planned.append(row)
            continue
        tell(row.name)
        planned.append(_planned(row, budget, online))
    return tuple(planned)


def _planned(row: ModelRow, budget: str, online: bool) -> ModelRow:
    from conmoe_edge import api

    try:
        return replace(row, report=api.plan(row.name, budget=budget, offline=not online))
    except UsageError:
        raise  # about the budget, and so about every model
    except ConmoeError as error:
        return replace(row, problem=error)


def _row(
    name: str, target: str, own: bool, cached: dict[str, CachedModel]
) -> tuple[ModelRow, str | None]:
    try:
        meaning = resolve(name)
    except ConmoeError as error:  # a folder that is gone
        return ModelRow(name, target, own, "absent", None, problem=error), None
    if meaning.folder is not None:
        return ModelRow(name, target, own, "folder", _weights(meaning.folder)), None
    assert meaning.hub_id is not None
    model = cached.get(meaning.hub_id)
    state, nbytes = ("absent", None) if model is None else (_state(model), model.nbytes)
    return ModelRow(name, target, own, state, nbytes), meaning.hub_id


def _state(model: CachedModel) -> str:
    return "cached" if model.whole else "partly"


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def to_json(rows: tuple[ModelRow, ...]) -> list[dict[str, Any]]:
    """Plain JSON; sizes in bytes."""
    return [
        {
            "name": row.name,
            "target": row.target,
            "own": row.own,
            "here": row.here,
            "bytes": row.nbytes,
            "plan": None if row.report is None else row.report.to_json()["plan"],
            "problem": None
            if row.problem is None
            else {
                "type": type(row.problem).__name__,
                "what": row.problem.what,
                "why": row.problem.why,
                "fix": row.problem.fix,
            },
        }
        for row in rows
    ]
