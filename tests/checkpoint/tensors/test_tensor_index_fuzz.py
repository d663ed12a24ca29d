"""Sound checkpoints with random bytes changed: refused, or read as the library does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import ShardReader
from conmoe_edge.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32),
    "a": torch.arange(8, dtype=torch.int16).view(2, 4),
    "c": torch.zeros(0),
}
SOUND = save(TENSORS)
INDEX = json.dumps({"weight_map": dict.fromkeys(TENSORS, "s.safetensors")}).encode()

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "drop"]),
        # Most of the sense is in the length and the header, so most of the damage goes there.
        st.one_of(st.integers(0, 8), st.integers(0, len(SOUND))),
        st.one_of(st.integers(0, 255), st.sampled_from([0, 255, *b'{}[]",:0-9'])),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    out = bytearray(data)
    for kind, position, value in changes:
        position = min(position, max(0, len(out) - 1))
        if kind == "set" and out:
            out[position] = value
        elif kind == "cut":
            del out[position:]
        elif kind == "insert":
            out.insert(position, value)
        elif out:
            del out[position]
    return bytes(out)


def read_all(folder: Path) -> dict[str, torch.Tensor] | None:
    try:
        index = CheckpointIndex.open(folder)
        with ShardReader(index) as reader:
            return {name: reader[name][...] for name in reader}
    except CheckpointError as error:
        assert "\n" not in error.what + error.why + error.fix
        return None


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits)
def test_damaged_weights(changes: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        path = folder / "model.safetensors"
        path.write_bytes(mutate(SOUND, changes))
        tensors = read_all(folder)
        if tensors is not None:
            with safe_open(path, framework="pt") as handle:
                assert set(handle.keys()) == set(tensors)
                for key, tensor in tensors.items():
                    expected = handle.get_tensor(key)
                    assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
                    assert _raw(tensor) == _raw(expected)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits)
def test_damaged_index(changes: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        save_file(TENSORS, folder / "s.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(mutate(INDEX, changes))
        tensors = read_all(folder)
        assert tensors is None or set(tensors) == set(TENSORS)


def _raw(tensor: torch.Tensor) -> bytes:
    return (
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )
