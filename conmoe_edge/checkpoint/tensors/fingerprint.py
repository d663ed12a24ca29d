"""What makes two runs the same run: the source's files and the settings, as short strings.

``fingerprint`` does not read a whole model. It takes the hub's own SHA-256 where a file is a link
into the hub's cache, and for other files the size, the header, and the first and last MiB of the
data: enough to notice another checkpoint, a new download or a truncated file, not enough to notice
a deliberate change in the middle of a shard (``sampled`` says so).

Peak memory: one header or one MiB. Raises ``CheckpointError`` for files that cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.fs.contained import open_inside, path_inside
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex, ShardFile, require_config
from conmoe_edge.errors import CheckpointError

SAMPLE = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint(index: CheckpointIndex, folder: Path | None = None) -> dict[str, Any]:
    """The identity of a source model: ``{"config", "files": {name: {"size", "sha256" | "sampled"}},
    "id"}``.

    ``config`` is the hash of ``config.json``, ``id`` one over the rest. ``folder`` is where that file lies, if not
    beside the weights.
    """
    return identity_of(
        folder or index.folder, {name: _file(index, shard) for name, shard in index.files.items()}
    )


def identity_of(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``fingerprint`` from what is known of each weights file; ``config.json`` lies in ``folder``."""
    config = require_config(folder)
    listed = {name: dict(facts) for name, facts in sorted(files.items())}
    result: dict[str, Any] = {"config": hashlib.sha256(config).hexdigest(), "files": listed}
    result["id"] = settings_fingerprint(result)
    return result


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of plain JSON values, the same for the same values in any order of the keys."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _file(index: CheckpointIndex, shard: ShardFile) -> dict[str, Any]:
    blob = path_inside(index.folder, shard.name)
    if shard.path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return {"size": shard.size, "sha256": blob.name}
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_inside(index.folder, shard.name), "rb") as file:
            digest.update(file.read(min(shard.data_start + SAMPLE, shard.size)))
            file.seek(max(0, shard.size - SAMPLE))
            digest.update(file.read(SAMPLE))
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {shard.path}.",
            error.strerror or "",
            "Check the disk, and download or copy the model again.",
        ) from error
    return {"size": shard.size, "sampled": digest.hexdigest()}
