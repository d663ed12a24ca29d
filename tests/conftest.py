"""For every test: folders of the user's own out of reach, one thread, no hub."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from used_names import needs_of

from conmoe_edge.system_calls import system_name

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several test processes share the cores; threads that wait by spinning would take them from each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where there is no GPU, Triton's interpreter takes its place (tests/offload/kernels/interpreted.py).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One for all tests of a process: what a plan measures is measured once."""
    os.environ["CONMOE_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_user_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    home: Path = tmp_path_factory.mktemp("user")
    monkeypatch.setenv("CONMOE_CONFIG_DIR", str(home / "config"))
    monkeypatch.setenv("CONMOE_STATE_DIR", str(home / "state"))
    yield home


@pytest.fixture(autouse=True)
def _nothing_for_good() -> Iterator[None]:
    """Commands that run one model set aside what is there (``memory/garbage.py``); a test process runs many."""
    yield
    gc.unfreeze()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """On Windows and macOS: files that cannot be imported there."""
    if system_name() not in ("windows", "darwin") or collection_path.suffix != ".py":
        return None
    return True if needs_of(collection_path, system_name()).get("") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On Windows and macOS: tests that use what is not there are skipped by its name."""
    if system_name() not in ("windows", "darwin"):
        return
    for item in items:
        name = needs_of(item.path, system_name()).get(getattr(item, "originalname", item.name))
        if name:
            item.add_marker(pytest.mark.skip(reason=f"needs {name}"))
