"""``models``: every name that a model can have, what it leads to, what of it is on this disk, what would fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conmoe_edge.checkpoint.sources.hub_cache import CachedModel, cached_models
from conmoe_edge.checkpoint.sources.locate import aliases
from conmoe_edge.checkpoint.sources.model_names import own_aliases, resolve
from conmoe_edge.errors import ConmoeError, HubUnreachable, UsageError

if TYPE_CHECKING:
    from conmoe_edge.api.planning import PlanReport


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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; sizes in bytes."""
        problem = self.problem
        return {
            "name": self.name,
            "target": self.target,
            "own": self.own,
            "here": self.here,
            "bytes": self.nbytes,
            "plan": None if self.report is None else self.report.to_json()["plan"],
            "problem": None
            if problem is None
            else {
                "type": type(problem).__name__,
                "what": problem.what,
                "why": problem.why,
                "fix": problem.fix,
            },
        }


def models(
    budget: str | None = None, *, online: bool = False, on_plan: Callable[[str], None] | None = None
) -> tuple[ModelRow, ...]:
    """Every alias, then what the hub's cache holds beyond them; no weight is read.

    Args:
        budget: as for ``plan``; also says how each model would fit into it.
        online: ask the hub about models that are not on this disk; else no socket is opened.
        on_plan: called with a model's name before it is planned for.

    Raises:
        UsageError: the budget is none, or nothing is to be asked of the hub.
        HubUnreachable: a model is to be asked about, and the hub does not answer.
    """
    if online and budget is None:
        raise UsageError("--online has nothing to ask.", "", "--online --gpu SIZE")
    rows = _rows()
    if budget is None:
        return tuple(rows)
    planned = []
    for row in rows:
        if row.here in ("folder", "cached") or online:
            if on_plan is not None:
                on_plan(row.name)
            row = _planned(row, budget, online)
        planned.append(row)
    return tuple(planned)


def _rows() -> list[ModelRow]:
    cached, own = cached_models(), own_aliases()
    rows, named = [], set()
    for name, target in aliases().items():
        row, hub_id = _row(name, target, name in own, cached)
        rows.append(row)
        named.add(hub_id)
    for hub_id, model in cached.items():
        if hub_id not in named:
            rows.append(ModelRow(hub_id, hub_id, False, _state(model), model.nbytes))
    return rows


def _planned(row: ModelRow, budget: str, online: bool) -> ModelRow:
    from conmoe_edge.api.planning import plan

    try:
        return replace(row, report=plan(row.name, budget=budget, offline=not online))
    except (UsageError, HubUnreachable):
        raise  # about the budget, or about the network, and so about every model
    except ConmoeError as error:
        return replace(row, problem=error)


def _row(
    name: str, target: str, own: bool, cached: dict[str, CachedModel]
) -> tuple[ModelRow, str | None]:
    try:
        meaning = resolve(name)
    except ConmoeError as error:  # a folder that is gone
        return ModelRow(name, target, own, "absent", None, problem=error), None
    if meaning.place is not None:
        return ModelRow(name, target, own, "folder", _weights(meaning.place)), None
    assert meaning.hub_id is not None
    model = cached.get(meaning.hub_id)
    state, nbytes = ("absent", None) if model is None else (_state(model), model.nbytes)
    return ModelRow(name, target, own, state, nbytes), meaning.hub_id


def _state(model: CachedModel) -> str:
    return "cached" if model.whole else "partly"


def _weights(place: Path) -> int:
    if not place.is_dir():
        return place.stat().st_size
    files = (path for kind in ("safetensors", "gguf") for path in place.glob(f"*.{kind}"))
    return sum(path.stat().st_size for path in files if path.is_file())
