"""Whether every number of a package is one: dense weights, records, constants, predictor.

``inspect --verify`` looks at all of them. A package can be loaded without that, because reading everything takes as
long as reading everything does; then records are looked at as far as ``record_check.py`` says, and what the model
computes is looked at after every step (``offload/generation/finite.py``), which comes here to name the tensor.

Peak memory: one tensor or record. Raises ``PackageError`` that names file and tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from conmoe_edge.checkpoint.format import low_bits
from conmoe_edge.checkpoint.format.forms import LOW_BITS
from conmoe_edge.checkpoint.format.manifest import (
    CONSTANTS_FILE,
    PREDICTOR_FILE,
    UNCHANGED,
    ExpertId,
    Manifest,
)
from conmoe_edge.checkpoint.format.record_check import RecordCheck
from conmoe_edge.checkpoint.format.records import view
from conmoe_edge.checkpoint.format.slot_map import SlotMap
from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE, quantised_forms
from conmoe_edge.checkpoint.package.record_headers import record_index, record_name
from conmoe_edge.checkpoint.package.slot_constants import read_constants
from conmoe_edge.checkpoint.package.small_tensors import AGAIN, damaged, header_of, read_values
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.errors import CheckpointError, PackageError

NOT_NUMBERS = "holds NaN or infinity"


def verify_values(folder: Path, manifest: Manifest) -> None:
    """Read every tensor of the package in ``folder``.

    Raises:
        PackageError: one holds NaN or infinity, or is not what the manifest says.
    """
    try:
        with ShardReader(CheckpointIndex.open(folder)) as reader:
            forms = quantised_forms(reader.index.tensors)
            packed = {name + DENSE_SCALE for name, kind in forms.items() if kind in LOW_BITS}
            for name in reader:
                tensor = reader[name][...]
                if is_broken(low_bits.units(tensor) if name in packed else tensor):
                    file = reader.index.tensors[name].file
                    raise damaged(folder / file, f"{name} {NOT_NUMBERS}")
    except CheckpointError as error:
        raise PackageError(error.what, error.why, AGAIN) from error
    if manifest.method == UNCHANGED:
        return
    found = broken_record(folder, manifest, (entry.id for entry in manifest.prototypes))
    if found:
        raise damaged(folder, found)
    read_constants(folder / CONSTANTS_FILE, SlotMap.of_manifest(manifest))
    if manifest.prefetch is not None:
        path = folder / PREDICTOR_FILE
        read_values(path, header_of(path))


def broken_record(folder: Path, manifest: Manifest, prototypes: Iterable[ExpertId]) -> str:
    """The first of ``prototypes`` whose record holds something that is no number, and what; empty where none does.

    Raises:
        PackageError: a record cannot be read.
    """
    entries = {entry.id: entry for entry in manifest.prototypes}
    try:
        with ShardReader(record_index(folder, manifest)) as reader:
            for one in prototypes:
                layout = manifest.layouts[entries[one].layout]
                record = reader[record_name(one)][...]
                why = RecordCheck(layout).wrong(record)
                for name, part in view(layout, record).items():
                    if not why and is_broken(part):
                        why = f"{name} {NOT_NUMBERS}"
                if why:
                    return f"{why} in the record of prototype {list(one)}"
    except CheckpointError as error:
        raise PackageError(error.what, error.why, AGAIN) from error
    return ""


def is_broken(tensor: Tensor) -> bool:
    """Whether a tensor holds something that is no number."""
    if tensor.dtype == torch.float8_e8m0fnu:  # torch has no ``isfinite`` for it
        return bool((tensor.view(torch.uint8) == 255).any())
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
