"""The hub of this process is one on 127.0.0.1 (``benchmarks/hub_server.py``), with a cache of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # benchmarks/ is no part of the package

from benchmarks.hub_server import (
    Fault,
    Hub,
    Serving,
    bytes_file,
    folder_repository,
)

__all__ = [
    "Fault",
    "Hub",
    "Serving",
    "bytes_file",
    "folder_repository",
    "local_hub",
    "put_into_cache",
]


def put_into_cache(folder: Path, cache: Path, commit: str) -> Path:
    """The model ``org/name`` in a hub's cache, as it was at ``commit``: its snapshot."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


@contextmanager
def local_hub(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """While the block runs, names of models lead to ``hub``, and downloads to ``cache``."""
    with Serving(hub) as serving:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setenv("HF_ENDPOINT", serving.endpoint)
        patch.setenv("HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", serving.endpoint)
        template = serving.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(serving.endpoint)}))
        patch.setattr(hf_api.api, "endpoint", serving.endpoint)
        huggingface_hub.close_session()
        try:
            yield serving
        finally:
            huggingface_hub.close_session()
