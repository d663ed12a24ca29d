"""A package, opened through its own index and manifest before any other library sees its path.

Every way of running a package begins with ``open_package``. What it checked is what is run: one folder, one manifest,
and exactly those weights that transformers will take from this folder (``weights_taken``). No pickle can be among them.

No torch here. Peak memory: the manifest and the headers. Raises ``PackageError`` and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.fs.contained import is_there
from conmoe_edge.checkpoint.package.manifest_io import verify_package
from conmoe_edge.checkpoint.tensors.folder_check import check_folder
from conmoe_edge.checkpoint.tensors.tensor_index import (
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    CheckpointIndex,
)
from conmoe_edge.errors import CheckpointError, PackageError

_AGAIN = "Make the package again with conmoe-edge fit, or copy it again from where it came from."
_RANKS_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", re.ASCII | re.IGNORECASE)
"""The files of a checkpoint that was saved by many ranks, which transformers prefers to every other."""


@dataclass(frozen=True, slots=True)
class OpenedPackage:
    """A checked package; no weight of it is read.

    Attributes:
        folder: as it was named.
        manifest: ``conmoe.json``.
        index: where the dense weights lie; the weights of the whole model in a package that left it unchanged.
    """

    folder: Path
    manifest: Manifest
    index: CheckpointIndex

    def is_in(self, folder: Path) -> bool:
        """Whether this is the package in ``folder``."""
        try:
            return folder.resolve() == self.folder.resolve()
        except (OSError, RuntimeError):
            return False


def open_package(folder: Path, *, deep: bool = False) -> OpenedPackage:
    """Check the package in ``folder``: manifest, files and sizes (with ``deep`` also checksums), headers of the dense
    weights, and that nothing in it leads out of it or would be taken in the place of what the manifest names.

    Raises:
        PackageError: no package, or what is wrong with it.
    """
    manifest = verify_package(folder, deep=deep)
    # Earlier versions linked the weights of an unchanged model symbolically where they lay on another disk.
    linked = manifest.method == UNCHANGED and any(path.is_symlink() for path in folder.iterdir())
    again = (
        f"Fit the model again: conmoe-edge fit MODEL --out {folder} --overwrite" if linked else ""
    )
    try:
        check_folder(folder)
        index = CheckpointIndex.open(folder)
    except CheckpointError as error:
        raise PackageError(error.what, error.why, again or error.fix or _AGAIN) from error
    _check_weights(folder, manifest, index)
    return OpenedPackage(folder, manifest, index)


def weights_taken(folder: Path, index: CheckpointIndex) -> set[str]:
    """The names of the files that transformers takes the weights from when it is given ``folder``."""
    return {SINGLE_FILE} if is_there(folder, SINGLE_FILE) else set(index.files)


def _check_weights(folder: Path, manifest: Manifest, index: CheckpointIndex) -> None:
    """The weights in the folder are those of the manifest, and those that will be taken are the index's."""
    listed = set(manifest.files)
    if manifest.method == UNCHANGED:
        _check_linked(folder, manifest, index)
        listed |= set(index.files)
    for name in sorted(set(index.files) - listed):
        raise PackageError(
            f"{folder / name} is no file of the package.",
            f"{INDEX_FILE} names it, the manifest does not.",
            _AGAIN,
        )
    for name in sorted(path.name for path in folder.iterdir()):
        if name.startswith("."):
            continue
        low = name.lower()
        if low.endswith(PICKLE_SUFFIXES) and not (folder / name).is_dir():
            raise PackageError(
                f"{folder} holds a pickle ({name}).",
                "A pickle can run any program when it is opened, and no package has one.",
                f"Remove {name}, or make the package again with conmoe-edge fit.",
            )
        if _RANKS_FILE.fullmatch(low) or (low.endswith(".safetensors") and name not in listed):
            raise PackageError(
                f"{folder} holds weights that are no part of the package ({name}).",
                "They could be loaded in the place of those that were checked.",
                f"Remove {name}, or make the package again with conmoe-edge fit.",
            )
    taken = weights_taken(folder, index)
    if taken != set(index.files):
        raise PackageError(
            f"{folder} holds two sets of weights.",
            f"{INDEX_FILE} names others than {SINGLE_FILE}, which would be loaded.",
            _AGAIN,
        )


def _check_linked(folder: Path, manifest: Manifest, index: CheckpointIndex) -> None:
    """The weights of an unchanged model are not among the manifest's files; the model's fingerprint has their sizes."""
    fingerprint: Any = manifest.source.get("fingerprint")
    known: Any = fingerprint.get("files") if isinstance(fingerprint, Mapping) else None
    if not isinstance(known, Mapping):
        return
    sizes = {name: facts.get("size") for name, facts in known.items() if isinstance(facts, Mapping)}
    found = {name: shard.size for name, shard in index.files.items()}
    if sizes != found:
        name = min(
            name for name in sizes.keys() | found.keys() if sizes.get(name) != found.get(name)
        )
        raise PackageError(
            f"{folder / name} is not the file that the package was made with.",
            f"It should have {sizes.get(name, 'no')} bytes, and has {found.get(name, 'none')}.",
            _AGAIN,
        )
