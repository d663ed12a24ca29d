"""The same model has the same fingerprint, another one another; the hub's own hash where known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conmoe_edge.checkpoint.tensors.fingerprint import fingerprint, settings_fingerprint
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex


def of(folder: Path) -> dict[str, object]:
    return fingerprint(CheckpointIndex.open(folder))


def big(folder: Path, **changes: torch.Tensor) -> Path:
    """A model of 3 MiB and more: the middle of its file is not sampled."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    tensors = {name: torch.zeros(1 << 20, dtype=torch.uint8) for name in ("a", "b", "c", "d")}
    save_file(tensors | changes, folder / "model.safetensors")
    return folder


def test_a_copy_elsewhere_is_the_same(tmp_path: Path) -> None:
    assert of(big(tmp_path / "one")) == of(big(tmp_path / "two"))


@pytest.mark.parametrize("name", ["a", "d"])
def test_other_content_at_either_end(name: str, tmp_path: Path) -> None:
    changed = torch.zeros(1 << 20, dtype=torch.uint8)
    changed[-1 if name == "d" else 0] = 1
    assert of(big(tmp_path / "one"))["id"] != of(big(tmp_path / "two", **{name: changed}))["id"]


def test_other_header_or_config(tmp_path: Path) -> None:
    one = of(big(tmp_path / "one"))
    extra = torch.zeros(1, dtype=torch.uint8)
    assert of(big(tmp_path / "two", e=extra))["id"] != one["id"]
    (tmp_path / "one" / "config.json").write_text('{"a": 1}')
    assert of(tmp_path / "one")["id"] != one["id"]


def test_the_hub_cache_already_knows(sharded: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    files = of(snapshot)["files"]
    assert isinstance(files, dict)
    assert {facts["sha256"] for facts in files.values()} == {f"{1:064x}", f"{2:064x}"}


def test_settings_do_not_depend_on_order() -> None:
    first = settings_fingerprint({"rate": 0.5, "plan": {"a": 1, "b": None}})
    assert first == settings_fingerprint({"plan": {"b": None, "a": 1}, "rate": 0.5})
    assert first != settings_fingerprint({"rate": 0.5, "plan": {"a": 1, "b": 0}})
