"""A repository that holds nothing but GGUF files is refused with the command that gets one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_hub import Hub, bytes_file, local_hub

from conmoe_edge import api
from conmoe_edge.errors import CheckpointError

FILES = ("README.md", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "mmproj-F16.gguf")
PARTS = ("BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf")


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(
    ("names", "wanted", "file"),
    [
        (FILES, "m-Q4_K_M.gguf", "m-Q4_K_M.gguf"),
        (PARTS, "--include 'BF16/m-BF16-*.gguf'", PARTS[0]),
    ],
)
def test_it_is_said_how_to_get_one(
    with_config: bool, names: tuple[str, ...], wanted: str, file: str, tmp_path: Path, monkeypatch
) -> None:
    says = f"hf download org/name {wanted} --local-dir models, then name the file: models/{file}"
    files = {name: bytes_file(b"GGUF") for name in names}
    if with_config:
        files["config.json"] = bytes_file(b'{"model_type": "qwen3_moe"}')
    with local_hub(Hub({"org/name": files}), tmp_path / "cache", monkeypatch):
        with pytest.raises(CheckpointError, match="GGUF files only") as caught:
            api.plan("org/name", budget="4GB", device="cpu")
        assert caught.value.fix == says
        with pytest.raises(CheckpointError, match="GGUF files only"):
            api.fit("org/name", tmp_path / "out", budget="4GB", device="cpu")
