"""The journal: what is put in is what an opened one says, and prototype numbers are positions among all records."""

from __future__ import annotations

from pathlib import Path

import pytest

from conmoe_edge.checkpoint.format.manifest import ExpertId, SlotRecord
from conmoe_edge.checkpoint.format.slot_map import NONE
from conmoe_edge.checkpoint.fs.atomic_files import write_json
from conmoe_edge.compress.run.journal import NAME, Journal, StoredRecord
from conmoe_edge.errors import CheckpointError

FIRST = (SlotRecord(ExpertId(0, 1), 0.5, 0), SlotRecord(ExpertId(0, 1)), SlotRecord(None))
SECOND = (SlotRecord(ExpertId(0, 1)), SlotRecord(ExpertId(10, 0)), SlotRecord(ExpertId(2, 2)))


def filled(work: Path) -> Journal:
    journal = Journal.open(work)
    journal.decide(0, FIRST)
    journal.decide(2, SECOND)
    for number, expert in enumerate((ExpertId(10, 0), ExpertId(2, 2), ExpertId(0, 1))):
        journal.store(expert, StoredRecord("prototypes", 4096 * number, "int8", 16 + number))
    journal.rerouted["0"] = True
    return journal


def test_what_was_decided_comes_back_from_the_disk(tmp_path: Path) -> None:
    journal = filled(tmp_path)
    journal.phase, journal.done = "calibrate", 3
    journal.save()
    again = Journal.open(tmp_path)
    assert again == journal
    assert again.slots(0) == FIRST and again.slots(2) == SECOND
    assert again.stored() == {
        ExpertId(0, 1): StoredRecord("prototypes", 8192, "int8", 18),
        ExpertId(2, 2): StoredRecord("prototypes", 4096, "int8", 17),
        ExpertId(10, 0): StoredRecord("prototypes", 0, "int8", 16),
    }


def test_maps_number_the_prototypes_of_all_layers_by_layer_then_expert(tmp_path: Path) -> None:
    maps = filled(tmp_path).slot_maps([0, 2])
    assert maps[0].targets == (0, 0, NONE) and maps[2].targets == (0, 2, 1)
    assert maps[0].scales == (0.5, 1.0, 1.0) and maps[0].constants == (0, NONE, NONE)


def test_only_rerouted_layers_have_closed_slots(tmp_path: Path) -> None:
    journal = filled(tmp_path)
    assert journal.open_slots(0) == [True, True, False]
    assert journal.open_slots(2) is None


@pytest.mark.parametrize("text", ["{", '{"unknown": 1}'])
def test_a_damaged_journal_is_refused(tmp_path: Path, text: str) -> None:
    write_json(tmp_path / NAME, {})
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CheckpointError, match="journal") as error:
        Journal.open(tmp_path)
    assert "--fresh" in error.value.fix
