"""From the hub, the tensors of parts for pictures are fetched only if they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from families import save_tokenizer
from local_hub import Hub, folder_repository, local_hub
from multimodal import save_tiny_multimodal

from conmoe_edge import api
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex

NAME = "org/tiny-vl"
HEADERS = 1 << 17


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More bytes of pictures than of text, and of either more than is read to see a header."""
    folder = tmp_path_factory.mktemp("source") / "model"
    wide = {"hidden_size": 256, "intermediate_size": 512, "depth": 3}
    text = {"hidden_size": 64, "moe_intermediate_size": 64}
    save_tiny_multimodal(
        "qwen3_vl_moe", folder, vision={**wide, "out_hidden_size": text["hidden_size"]}, **text
    )
    save_tokenizer(folder)
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog 012 " * 30)
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub({NAME: folder_repository(source)})
    with local_hub(hub, tmp_path / "cache", monkeypatch):
        yield hub


@pytest.mark.parametrize("keep", [False, True])
def test_pictures_come_only_if_they_are_kept(
    keep: bool, source: Path, hub: Hub, tmp_path: Path
) -> None:
    sizes = {name: one.nbytes for name, one in CheckpointIndex.open(source).tensors.items()}
    pictures = sum(size for name, size in sizes.items() if ".visual." in name)
    text = sum(sizes.values()) - pictures
    assert pictures > text > 2 * HEADERS
    wanted = text + pictures if keep else text
    report = api.fit(
        NAME,
        tmp_path / "out",
        budget="4GB",
        device="cpu",
        rate=0.5,
        calibration=source.parent / "text.txt",
        calibration_tokens=512,
        keep_vision=keep,
    )
    assert report.plan.fetching is not None
    assert report.plan.fetching.nbytes == wanted
    assert hub.weight_bytes() <= wanted + HEADERS
    local = api.fit(
        str(source),
        tmp_path / "local",
        budget="4GB",
        device="cpu",
        rate=0.5,
        calibration=source.parent / "text.txt",
        calibration_tokens=512,
        keep_vision=keep,
        passes=1,
    )
    for path in sorted(local.out.glob("dense-*")):
        assert path.read_bytes() == (report.out / path.name).read_bytes()
