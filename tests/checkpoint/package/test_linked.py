"""A model that fits as it is: hard links where that goes, copies where not, and never a link out of the package."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.fs import disk
from conmoe_edge.checkpoint.package import linked
from conmoe_edge.checkpoint.package.linked import link_model
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.errors import CheckpointError, NoSpace


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(linked, "_SMALL", 0)  # the weights of the test count as large ones
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.fixture
def another_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(linked.os, "link", refused)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_on_the_same_disk(sharded: Path, target: Path) -> None:
    written = link_model(CheckpointIndex.open(sharded), target)
    assert names(target) == names(sharded)
    assert {file.name for file in written} == {"config.json", "model.safetensors.index.json"}
    for path in sharded.glob("*.safetensors"):
        assert path.samefile(target / path.name)
    assert not any(path.is_symlink() for path in target.iterdir())


@pytest.mark.usefixtures("another_disk")
def test_on_another_disk_weights_are_copied(sharded: Path, target: Path) -> None:
    link_model(CheckpointIndex.open(sharded), target)
    for path in sharded.glob("*.safetensors"):
        copy = target / path.name
        assert not copy.is_symlink() and not path.samefile(copy)
        assert copy.read_bytes() == path.read_bytes()
    assert CheckpointIndex.open(target).tensors == CheckpointIndex.open(sharded).tensors


@pytest.mark.usefixtures("another_disk")
def test_not_where_they_do_not_fit(
    sharded: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = CheckpointIndex.open(sharded)
    sizes = sum(shard.size for shard in index.files.values())
    monkeypatch.setattr(disk, "free_bytes", lambda path: sizes - 1)
    with pytest.raises(NoSpace):
        link_model(index, target)
    assert not list(target.glob("*.safetensors"))


@pytest.mark.usefixtures("another_disk")
def test_weights_that_shrink_meanwhile(sharded: Path, target: Path) -> None:
    index = CheckpointIndex.open(sharded)
    os.truncate(sharded / next(iter(index.files)), 100)
    with pytest.raises(CheckpointError, match="was changed"):
        link_model(index, target)


def test_weights_that_became_a_link_out(sharded: Path, target: Path, tmp_path: Path) -> None:
    index = CheckpointIndex.open(sharded)
    name = next(iter(index.files))
    (sharded / name).rename(tmp_path / "elsewhere")
    (sharded / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leaves"):
        link_model(index, target)
