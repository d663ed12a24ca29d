"""What an unfinished run needs to go on: which layer is done, what was decided, which files are whole.

The journal names only files that were synced before it was replaced, so whatever it says is on the disk. Hidden states
are kept for the last finished layer only: ``hidden-<phase>-<layer>.safetensors`` beside it.

Disk: the hidden states twice while one takes the place of the other. Raises ``NoSpace``;
``CheckpointError`` when a file of an earlier run is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from conmoe_edge.checkpoint.fs.atomic_files import write_json
from conmoe_edge.compress.work.work_folder import load_tensors, save_tensors
from conmoe_edge.errors import CheckpointError

NAME = "journal.json"


@dataclass(slots=True)
class Journal:
    """The state of a run after its last durable step.

    Attributes:
        phase: ``prepare``, ``calibrate``, ``receipt`` or ``done``.
        done: layers finished in this phase.
        statistics: layer -> ``LayerStatistics`` as JSON.
        decisions: layer -> slot records as JSON.
        distances: layer -> distance of every slot to its prototype (``slot_overview.py``).
        files: file of the package -> size and checksum.
        records: record -> (file, offset, kind of layout, neurons).
        receipt: the quality receipt, once it is there.
        rerouted: layer -> whether its router may choose slots with something behind them only.
        notes: what the method had to say.
        budgets: layer -> prototypes, or parts of them where their widths differ, where layers do not get
            the same number.
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
        names = (
            "phase",
            "done",
            "statistics",
            "decisions",
            "distances",
            "files",
            "records",
            "receipt",
            "rerouted",
            "notes",
            "budgets",
            "seconds",
        )
        write_json(self.work / NAME, {name: getattr(self, name) for name in names})

    def save_hidden(self, phase: str, layer: int, hidden: Mapping[str, Tensor]) -> None:
        """Keep the hidden states that enter ``layer``."""
        save_tensors(self._hidden(phase, layer), hidden)

    def load_hidden(self, phase: str, layer: int) -> dict[str, Tensor]:
        """Bring them back, exactly as they were."""
        # Cloned, so that no memory map of a file that will be deleted stays behind.
        found = load_tensors(self._hidden(phase, layer))
        return {name: tensor.clone() for name, tensor in found.items()}

    def drop_hidden(self, phase: str, layer: int) -> None:
        """Delete what is not needed any more."""
        self._hidden(phase, layer).unlink(missing_ok=True)

    def _hidden(self, phase: str, layer: int) -> Path:
        return self.work / f"hidden-{phase}-{layer}.safetensors"
