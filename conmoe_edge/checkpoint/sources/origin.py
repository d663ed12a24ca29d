"""From a manifest back to the model that a package was made from, without opening a socket.

Raises ``CheckpointError`` where the name leads to another model than the package remembers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conmoe_edge.checkpoint.format.manifest import Manifest
from conmoe_edge.checkpoint.sources.locate import Source, locate
from conmoe_edge.checkpoint.sources.model_names import aliases, is_hub_id
from conmoe_edge.checkpoint.tensors.fingerprint import fingerprint
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import CheckpointError, ModelNotFound, UsageError


def find_origin(manifest: Manifest) -> Source | None:
    """The source model on this machine; ``None`` where it is not there.

    Raises:
        CheckpointError: there is a model of that name, but it is another one, or it is damaged.
    """
    name, revision = manifest.source.get("name"), manifest.source.get("revision")
    if not isinstance(name, str) or not name:
        return None
    wanted = revision if isinstance(revision, str) else None
    try:
        found = locate(name, revision=wanted, offline=True)
    except (ModelNotFound, UsageError):
        return None
    difference = differs(manifest.source.get("fingerprint"), fingerprint_of(found))
    if difference:
        raise CheckpointError(
            f"{name} is not the model that the package was made from.",
            difference,
            "--against with the folder of the right one, or --against none",
        )
    return found


def hub_origin(manifest: Manifest) -> str | None:
    """The id on the hub of the model that a package was made from; ``None`` where it was a folder, or is not known."""
    name, revision = manifest.source.get("name"), manifest.source.get("revision")
    if not isinstance(name, str) or not isinstance(revision, str):
        return None  # a folder has no revision, and may be called owner/name all the same
    hub_id = aliases().get(name.lower(), name).partition("@")[0]
    return hub_id if is_hub_id(hub_id) else None


def fingerprint_of(source: Source) -> dict[str, Any]:
    """The identity of a model in a folder."""
    index = CheckpointIndex.open(source.path) if source.gguf is None else source.gguf.index
    return fingerprint(index, source.path)


def differs(wanted: Any, found: Mapping[str, Any]) -> str:
    """What two fingerprints do not share, as half a sentence; empty where they are of one model.

    A file in the hub's cache has the hub's checksum and a copy of it a sampled one. These cannot be
    compared, and the sizes decide.
    """
    if not isinstance(wanted, Mapping) or wanted.get("id") == found["id"]:
        return ""
    if wanted.get("config") != found["config"]:
        return "its config.json has changed"
    files = wanted.get("files")
    ours, theirs = files if isinstance(files, Mapping) else {}, found["files"]
    for name in sorted(set(ours) | set(theirs)):
        one, other = ours.get(name), theirs.get(name)
        if not isinstance(one, Mapping) or other is None:
            return f"only one of them has the file {name}"
        for key in ("size", "sha256", "sampled"):
            if key in one and key in other and one[key] != other[key]:
                return f"{name} has changed"
    return ""
