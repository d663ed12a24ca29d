"""The records of a package as its files name them, against what the manifest says of them.

Three things say where a record lies: the manifest (a file and an offset, by which the runtime reads), the file's own
header (by which readers of single records go), and the record's name. A package whose three say different things would
be another model to each of them. ``record_index`` lets only those through that agree. Reads headers, no record.

Peak memory: the headers. Raises ``PackageError``.
"""

from __future__ import annotations

from pathlib import Path

from conmoe_edge.checkpoint.format.manifest import ExpertId, Manifest
from conmoe_edge.checkpoint.package.small_tensors import AGAIN, damaged
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, index_files
from conmoe_edge.errors import CheckpointError, PackageError


def record_name(expert: ExpertId) -> str:
    """The name of an expert's record inside a prototypes file."""
    return f"prototypes.{expert.layer}.{expert.expert}"


def expert_of(name: str) -> ExpertId:
    """The expert whose record has this name."""
    _, layer, expert = name.split(".")
    return ExpertId(int(layer), int(expert))


def record_index(folder: Path, manifest: Manifest) -> CheckpointIndex:
    """The prototype files of a package: one tensor for every prototype and no other, uint8 [record bytes], where the
    manifest says.

    Raises:
        PackageError: naming file and record where that is not so.
    """
    try:
        index = index_files(folder, sorted({entry.file for entry in manifest.prototypes}))
    except CheckpointError as error:
        raise PackageError(error.what, error.why, AGAIN) from error
    wanted = {record_name(entry.id): entry for entry in manifest.prototypes}
    for name, entry in wanted.items():
        found, nbytes = index.tensors.get(name), manifest.layouts[entry.layout].nbytes
        if found is None or found.file != entry.file:
            raise damaged(folder / entry.file, f"it has no record {name}")
        if found.dtype != "U8" or found.shape != (nbytes,):
            held = f"{found.dtype} {list(found.shape)}"
            raise damaged(folder / entry.file, f"{name} is {held:.80}, not U8 [{nbytes}]")
        if found.offset != entry.offset:
            raise damaged(
                folder / entry.file,
                f"{name} lies at byte {found.offset}, the manifest looks for it at {entry.offset}",
            )
    for name, found in index.tensors.items():
        if name not in wanted:
            raise damaged(folder / found.file, f"no prototype has its record {name!r:.80}")
    return index
