"""The routing trace: what the router chose, no padding, the same bytes after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_tiny, save_tokenizer
from safetensors.torch import load_file

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import ROUTING_FILE
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.trace_recorder import RoutingRecorder
from conmoe_edge.errors import PackageError
from conmoe_edge.offload.simulate.load_settings import prototype_trace, read_trace, settings_for


def _tokens(rows: list[int], length: int) -> TokenSet:
    """Sequences with so many real tokens each."""
    mask = torch.tensor([[column < real for column in range(length)] for real in rows])
    return TokenSet(torch.zeros_like(mask, dtype=torch.long), mask, ("text",) * len(rows))


def test_whole_sequences_real_tokens_only_held_out_first(tmp_path: Path) -> None:
    sets = {"held_out": _tokens([4, 3], 4), "train": _tokens([4, 4, 2, 4], 4)}
    recorder = RoutingRecorder(sets, most=17)  # both held-out sequences, and two of the others
    index = {
        name: torch.arange(tokens.ids.numel() * 2).reshape(-1, 2) % 6
        for name, tokens in sets.items()
    }
    index["train"][0, 0], index["train"][1, 1] = -1, 99  # skip marks of either kind
    for layer in (1, 2):
        recorder.start_layer()
        for name in ("train", "held_out"):
            recorder.start_set(name)
            for batch in index[name].split(8):
                recorder.add(batch, 6)
        recorder.save_layer(tmp_path, layer)
    assert recorder.write(tmp_path, tmp_path, (1, 2)) is not None
    found = load_file(tmp_path / ROUTING_FILE)
    assert found["sequences"].tolist() == [4, 3, 4, 2]
    train = index["train"].clone()
    train[0, 0] = train[1, 1] = 6
    expected = torch.cat([index["held_out"][:7], train[:4], train[8:10]])
    assert found["routing.1"].dtype == torch.uint8
    assert torch.equal(found["routing.1"].long(), expected)
    assert torch.equal(found["routing.1"], found["routing.2"])
    recorder.drop(tmp_path, (1, 2))
    assert [path.name for path in tmp_path.iterdir()] == [ROUTING_FILE]


def test_many_router_slots_take_a_wider_type(tmp_path: Path) -> None:
    recorder = RoutingRecorder({"held_out": _tokens([2], 2)})
    recorder.start_layer()
    recorder.start_set("held_out")
    recorder.add(torch.tensor([[255, 0], [299, -1]]), 300)
    recorder.save_layer(tmp_path, 0)
    recorder.write(tmp_path, tmp_path, (0,))
    found = load_file(tmp_path / ROUTING_FILE)["routing.0"]
    assert found.dtype == torch.int16 and found.tolist() == [[255, 0], [299, 300]]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same fit in one go, and stopped in between."""
    folder = tmp_path_factory.mktemp("trace")
    save_tiny("qwen3_moe", folder / "model", mlp_only_layers=[])
    save_tokenizer(folder / "model")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789 " * 30)

    def fit(out: Path, **more: Any) -> None:
        api.fit(
            str(folder / "model"), out, budget="4GB", device="cpu", rate=0.5,
            calibration=text, calibration_tokens=512, **more,
        )  # fmt: skip

    def stop(step: Any) -> None:
        if step.stage == "calibrate" and step.step == 2:
            raise KeyboardInterrupt

    fit(folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(folder / "parts", progress=stop)
    fit(folder / "parts")
    return folder / "whole", folder / "parts"


def test_same_bytes_after_an_interruption(packages: tuple[Path, Path]) -> None:
    whole, parts = ((folder / ROUTING_FILE).read_bytes() for folder in packages)
    assert whole == parts


def test_the_package_carries_a_trace_that_can_be_replayed(packages: tuple[Path, Path]) -> None:
    folder = packages[0]
    manifest = load_manifest(folder)
    trace = read_trace(folder, manifest)
    assert trace is not None and trace.layers == tuple(sorted(manifest.slots))
    assert 0 < trace.tokens <= 4096
    assert manifest.cache == (), "4 GB hold every prototype of this model"
    asked = prototype_trace(trace, manifest)
    for layer, rows in zip(asked.layers, asked.asked, strict=True):
        used = {slot.prototype for slot in manifest.slots[layer]}
        assert {manifest.prototypes[n].id for row in rows for n in row} <= used
    assert len(manifest.layouts) > 1, "prototypes of several widths"
    members = [
        sum(one.layout == n for one in manifest.prototypes) for n in range(len(manifest.layouts))
    ]
    slots = tuple(max(1, count // 2) for count in members)
    found = settings_for(folder, manifest, slots)
    assert tuple(one.slots for one in found) == slots and max(members) > 1
    forced = settings_for(folder, manifest, slots, "lru")
    for one, lru, count in zip(found, forced, members, strict=True):
        assert lru.policy == "lru"
        if count > 1:  # else it is always there
            assert one.predicted_hit is not None and set(lru.candidates) == {"lru"}


@pytest.mark.parametrize("what", ["cut", "layers", "tokens", "float"])
def test_a_damaged_trace_is_an_error_of_the_package(
    what: str, packages: tuple[Path, Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file as load
    from safetensors.numpy import save_file

    manifest = load_manifest(packages[0])
    path = tmp_path / ROUTING_FILE
    tensors = load(packages[0] / ROUTING_FILE)
    if what == "cut":
        path.write_bytes((packages[0] / ROUTING_FILE).read_bytes()[:100])
    else:
        name = next(name for name in tensors if name != "sequences")
        if what == "layers":
            tensors["routing.77"] = tensors.pop(name)
        elif what == "tokens":
            tensors[name] = tensors[name][1:].copy()
        else:
            tensors[name] = tensors[name].astype(np.float32)
        save_file(tensors, path)
    with pytest.raises(PackageError, match="damaged"):
        read_trace(tmp_path, manifest)
