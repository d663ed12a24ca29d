"""What an unfinished run needs to go on: which layer is done, what was decided, which files are whole.

The journal names only files that were synced before it was replaced, so whatever it says is on the disk. It is JSON;
typed readers are beside the fields. Raises ``NoSpace``; ``CheckpointError`` where that of an earlier run is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.fs.atomic_files import WrittenFile, write_json
from conmoe_edge.checkpoint.package.record_headers import expert_of, record_name
from conmoe_edge.compress.stats.statistics import LayerStatistics
from conmoe_edge.errors import CheckpointError

NAME = "journal.json"


class StoredRecord(NamedTuple):
    """Where a prototype was written, and in which form."""

    file: str
    offset: int
    kind: str
    width: int


@dataclass(slots=True)
class Journal:
    """The state of a run after its last durable step.

    Attributes:
        phase: ``prepare``, ``calibrate``, ``receipt`` or ``done``.
        done: layers finished in this phase.
        statistics: layer -> ``LayerStatistics`` as JSON.
        decisions: layer -> slot records as JSON.
        distances: layer -> distance of every router slot to its prototype (``slot_overview.py``).
        files: file of the package -> size and checksum.
        records: record -> ``StoredRecord``.
        receipt: the quality receipt, once it is there.
        rerouted: layer -> whether its router may choose slots with something behind them only.
        notes: what the method had to say.
        budgets: layer -> prototypes, or parts of them where their widths differ, where layers do not get the same
            number.
        worth: layer -> what was measured of it to divide the bytes (``LayerOriginal.worth``); empty where it was not.
        scope: layers that share prototypes, where that was measured; else 0.
        seconds: time by part over all runs.
    """

    work: Path
    phase: str = "prepare"
    done: int = 0
    statistics: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)
    distances: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    rerouted: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    budgets: dict[str, int] = field(default_factory=dict)
    worth: dict[str, float] = field(default_factory=dict)
    scope: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, work: Path) -> Journal:
        """The journal of an earlier run in this folder, or a new one."""
        path = work / NAME
        if not path.is_file():
            return cls(work)
        try:
            return cls(work, **json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"The journal {path} of the unfinished run is damaged.",
                str(error),
                "start over with --fresh",
            ) from error

    def save(self) -> None:
        """Make the state durable."""
        names = [one.name for one in fields(self) if one.name != "work"]
        write_json(self.work / NAME, {name: getattr(self, name) for name in names})

    def add_files(self, written: Iterable[WrittenFile]) -> None:
        """Files of the package that are whole now."""
        for file in written:
            self.files[file.name] = file.entry()

    def decide(self, layer: int, slots: Iterable[SlotRecord]) -> None:
        """What the router slots of a layer became."""
        self.decisions[str(layer)] = [
            [list(one.prototype) if one.prototype else None, one.scale, one.constant]
            for one in slots
        ]

    def slots(self, layer: int) -> tuple[SlotRecord, ...]:
        """What ``decide`` kept."""
        return tuple(
            SlotRecord(ExpertId(*prototype) if prototype else None, scale, constant)
            for prototype, scale, constant in self.decisions[str(layer)]
        )

    def store(self, expert: ExpertId, record: StoredRecord) -> None:
        """Where a prototype was written."""
        self.records[record_name(expert)] = list(record)

    def stored(self) -> dict[ExpertId, StoredRecord]:
        """All prototypes that were written, ascending; the position is the prototype number."""
        return {
            expert: StoredRecord(*self.records[record_name(expert)])
            for expert in sorted(map(expert_of, self.records))
        }

    def slot_maps(self, layers: Iterable[int]) -> dict[int, SlotMap]:
        """MoE layer -> its map, with the prototype numbers of ``stored``."""
        numbers = {expert: number for number, expert in enumerate(self.stored())}
        return {layer: SlotMap.of(layer, self.slots(layer), numbers) for layer in layers}

    def open_slots(self, layer: int) -> list[bool] | None:
        """Which slots the router of the package's layer may choose; ``None`` where it is as it was."""
        if not self.rerouted.get(str(layer), False):
            return None
        return [not slot.dropped for slot in self.slots(layer)]

    def statistics_of(self, layers: Iterable[int]) -> Mapping[int, LayerStatistics]:
        """What calibration saw of every layer."""
        return {layer: LayerStatistics.from_json(self.statistics[str(layer)]) for layer in layers}
