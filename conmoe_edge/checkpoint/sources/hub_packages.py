"""Packages on the model hub, through ``huggingface_hub``: which commit a name means, what a package has, its files.

The manifest comes first, and decides: only the files that it lists are fetched, each is checked against its SHA-256,
and no code or pickle is among them. Files grow under the library's own names, so that a fetch that stops goes on.

Peak memory: the manifest. Raises ``ModelNotFound``, ``PackageError``, ``NoSpace``, ``ConmoeError``.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME, UNCHANGED, Manifest
from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.checkpoint.fs.disk import disk_errors, require_space
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_file, verify_package
from conmoe_edge.checkpoint.package.sidefiles import MODEL_CARD, NEVER, PATTERNS
from conmoe_edge.checkpoint.sources.hub import hub_errors
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE
from conmoe_edge.errors import PackageError

_WEIGHTS = "*.safetensors"
_KINDS = (*PATTERNS, MODEL_CARD, "*.json", _WEIGHTS)
"""What a package is made of; no other kind of file travels."""
_CONNECT = (
    "Check the network connection, and run the same command again: it goes on where it stopped."
)
_LIBRARY = ".cache"
"""Where the library keeps what it knows of a folder that it fetches into."""


def files_of(manifest: Manifest, named: str) -> tuple[str, ...]:
    """The files that travel with a package, the manifest first.

    Raises:
        PackageError: the manifest lists something else, such as code, or not the weights (a model left as it was).
    """
    if manifest.method == UNCHANGED:
        source = manifest.source.get("name") or "MODEL"
        raise PackageError(
            f"{named} is a model that was left as it was.",
            "Its weights are the original's, which the package does not list.",
            f"Fit the original on the other machine: conmoe-edge fit {source}",
        )
    for name in manifest.files:
        if not _travels(name):
            raise PackageError(
                f"{named} lists {name}, which no package has.",
                "Only weights and the small files of a model travel: code and pickles could run any program.",
                "Make the package again with conmoe-edge fit.",
            )
    return MANIFEST_NAME, *sorted({*manifest.files, CONFIG_FILE} - {MANIFEST_NAME})


def _travels(name: str) -> bool:
    word = name.lower()
    known = any(fnmatchcase(name, one) for one in _KINDS)
    return known and not any(fnmatchcase(word, one) for one in NEVER if one != _WEIGHTS)


def find_commit(hub_id: str, revision: str | None) -> str:
    """The commit that ``revision`` means now.

    Raises:
        ModelNotFound: the hub has none, or cannot be reached.
        PackageError: what is there is no package.
    """
    from huggingface_hub import HfApi

    with hub_errors(hub_id, revision, offline=False, connect=_CONNECT):
        info = HfApi().model_info(hub_id, revision=revision)
    if MANIFEST_NAME not in {one.rfilename for one in info.siblings or ()}:
        raise PackageError(
            f"{hub_id} is no package of conmoe-edge.",
            f"It has no {MANIFEST_NAME}.",
            f"Make one of it with: conmoe-edge fit {hub_id}",
        )
    return str(info.sha)


def fetch_package(
    hub_id: str, commit: str, folder: Path, tell: Callable[[str, int, int], None]
) -> Manifest:
    """Put the package at ``commit`` into ``folder``, or go on doing so. Nothing else is left there.

    Args:
        tell: called with a file's name, its number from 1 and how many there are, before it is fetched.

    Raises:
        ModelNotFound: the hub cannot be reached, or lacks a file.
        PackageError: a file is not what the manifest says; it is removed, so that it comes anew the next time.
        NoSpace: the disk has too little room.
    """
    _fetch(hub_id, commit, MANIFEST_NAME, folder)
    manifest = load_manifest(folder)
    names = files_of(manifest, hub_id)
    missing = sum(facts["size"] - _have(folder / name) for name, facts in manifest.files.items())
    require_space(folder, max(0, missing))
    for number, name in enumerate(names[1:], start=1):
        tell(name, number, len(names) - 1)
        _fetch(hub_id, commit, name, folder)
        try:
            if name in manifest.files:
                verify_file(folder, name, manifest.files[name], deep=True)
        except PackageError as error:
            with disk_errors(folder):
                (folder / name).unlink(missing_ok=True)
            why = f"{name}: {error.why}" if error.why else name
            raise PackageError(
                f"{hub_id} does not match its manifest.",
                why,
                "Run the same command again: only this file comes anew. If it stays, the hub's own copy is damaged.",
            ) from error
    _sweep(folder, frozenset(names))
    return verify_package(folder)


def _fetch(hub_id: str, commit: str, name: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    with hub_errors(hub_id, commit, offline=False, connect=_CONNECT):
        hf_hub_download(hub_id, name, revision=commit, local_dir=folder)


def _have(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sweep(folder: Path, names: frozenset[str]) -> None:
    """Remove what the library kept, and what an earlier state of the package had."""
    with disk_errors(folder):
        for path in sorted(folder.iterdir()):
            if path.name == _LIBRARY:
                durable.remove_tree(path)
            elif path.name not in names:
                path.unlink()
