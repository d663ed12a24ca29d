"""What the hub's local cache holds, without a socket and without reading any weight.

``huggingface_hub`` scans its own folder; what is added is whether a model is whole. Raises ``CheckpointError`` where
the cache cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conmoe_edge.checkpoint.sources.hub import is_whole
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE
from conmoe_edge.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model in the cache.

    Attributes:
        hub_id: ``org/name``.
        nbytes: on the disk, all revisions together.
        commits: of the snapshots that have a config and all of their weights.
        place: its folder in the cache.
        used: seconds since the epoch when a file of it was last read, as far as the system notes that.
    """

    hub_id: str
    nbytes: int
    commits: tuple[str, ...]
    used: float
    place: Path

    @property
    def whole(self) -> bool:
        """Whether some snapshot is complete."""
        return bool(self.commits)


def cached_models() -> dict[str, CachedModel]:
    """Hub id -> what is there of it, sorted; empty without a cache."""
    from huggingface_hub import constants, errors, scan_cache_dir

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE)
    except errors.CacheNotFound:
        return {}
    except OSError as error:
        raise CheckpointError(
            f"The hub's cache {constants.HF_HUB_CACHE} cannot be read.",
            error.strerror or str(error),
            "check its permissions, or name another with HF_HOME",
        ) from error
    models = {}
    for repository in sorted(found.repos, key=lambda one: one.repo_id):
        if repository.repo_type == "model":
            commits = sorted(
                one.commit_hash for one in repository.revisions if _has_all(Path(one.snapshot_path))
            )
            models[repository.repo_id] = CachedModel(
                repository.repo_id,
                repository.size_on_disk,
                tuple(commits),
                repository.last_accessed,
                Path(repository.repo_path),
            )
    return models


def _has_all(snapshot: Path) -> bool:
    try:
        return (snapshot / CONFIG_FILE).is_file() and is_whole(snapshot)
    except (OSError, CheckpointError):
        return False


def remove_cached(hub_id: str) -> int:
    """Remove every revision of a model from the cache; how many bytes became free.

    Raises:
        CheckpointError: the cache cannot be read or written.
    """
    from huggingface_hub import constants, scan_cache_dir

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE)
        commits = [
            revision.commit_hash
            for repository in found.repos
            if repository.repo_type == "model" and repository.repo_id == hub_id
            for revision in repository.revisions
        ]
        strategy = found.delete_revisions(*commits)
        strategy.execute()
    except OSError as error:
        raise CheckpointError(
            f"{hub_id} cannot be removed from the hub's cache.",
            error.strerror or str(error),
            "check its permissions",
        ) from error
    return strategy.expected_freed_size
