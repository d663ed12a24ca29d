"""Bytes planned are bytes written: the records, the dense weights, and beside them only headers and small files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, save_tiny, save_tokenizer

from conmoe_edge import api
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.tensors.tensor_index import INDEX_FILE

SETTINGS: tuple[dict[str, Any], ...] = (
    {"precision": "source", "rate": 0.25, "method": "auto"},
    {"precision": "source", "rate": 0.25, "method": "auto", "widths": "equal"},
    {"precision": "bf16", "rate": 0.25, "method": "auto"},
    {"precision": "int8", "rate": 0.5, "method": "reap"},
    {"precision": "int4", "rate": 0.25, "method": "conmoe", "scope": 2},
    {"precision": "int8", "rate": 0.25, "method": "mone", "dense_precision": "int8"},
    {"precision": "lowrank", "rate": 0.25, "method": "mc-smoe"},
    {"precision": "int8", "rate": 0.0},
    {"bits": 5.0},
)
HEADER = 4096
"""A record file's header goes up to the first record, at a multiple of this."""
PER_TENSOR = 256
"""Name, type, shape and place of one tensor in the header of a dense file."""


def data_bytes(path: Path) -> tuple[int, int]:
    """Bytes of a safetensors file behind its header, and the number of its tensors."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return path.stat().st_size - 8 - length, len(header.keys() - {"__metadata__"})


def check(source: Path, out: Path, settings: dict[str, Any]) -> None:
    report = api.fit(
        str(source),
        out,
        budget="4GB",
        device="cpu",
        calibration=source.parent / "text.txt",
        calibration_tokens=128,
        overwrite=True,
        **settings,
    )
    plan, manifest = report.plan.plan, load_manifest(out)
    records = [manifest.layouts[entry.layout].nbytes for entry in manifest.prototypes]
    free = settings.get("method") == "auto" and settings.get("widths") != "equal"
    free = free or "bits" in settings
    if free:
        # Prototypes of several widths take what the plan counted, as far as whole records go into it.
        assert 0 <= plan.chosen.pool_bytes - sum(records) < plan.chosen.record_bytes
    else:
        assert sum(records) == plan.chosen.pool_bytes
        assert len(records) == plan.chosen.prototypes
    files = sorted(out.glob("dense-*.safetensors"))
    dense = [data_bytes(path) for path in files]
    terms = {term.name: term.nbytes for term in plan.terms}
    assert sum(nbytes for nbytes, _ in dense) == terms["Dense weights"]
    pools = sorted(out.glob("prototypes-*.safetensors"))
    weights = sum(path.stat().st_size for path in (*files, *pools))
    tensors = sum(count for _, count in dense)
    headers = HEADER * (len(files) + len(pools)) + PER_TENSOR * (tensors + len(records))
    left = plan.chosen.pool_bytes - sum(records)
    assert 0 <= weights + left - plan.disk_bytes <= headers
    # Beside the weights: the source's small files, and what is known of calibration.
    listed = {name: facts["size"] for name, facts in manifest.files.items()}
    assert sum(listed.values()) == report.bytes_written
    assert {*listed, "conmoe.json", "machine.json"} == {path.name for path in out.iterdir()}
    assert INDEX_FILE in listed


def prepare(family: str, folder: Path) -> Path:
    save_tiny(family, folder / family)
    save_tokenizer(folder / family)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog 012 " * 30)
    return folder / family


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("olmoe", tmp_path_factory.mktemp("planned"))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))
def test_every_precision_and_method(settings: dict[str, Any], olmoe: Path, tmp_path: Path) -> None:
    check(olmoe, tmp_path / "out", settings)


@pytest.mark.parametrize(
    "family",
    [
        "granitemoe",
        "gpt_oss",
        "qwen3_moe",
        *(pytest.param(one.model_type, marks=pytest.mark.slow) for one in FAMILIES),
    ],
)
def test_families(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """All settings with ``slow``, else the two that differ most."""
    slow = request.node.get_closest_marker("slow") is not None
    source = prepare(family, tmp_path)
    for settings in SETTINGS if slow else (SETTINGS[0], SETTINGS[5]):
        check(source, tmp_path / "out", settings)
