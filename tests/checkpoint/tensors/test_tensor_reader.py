"""Positioned reads: formats, slices, threads, truncation, transformers' loader on top."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conmoe_edge.checkpoint.format.dtypes import TORCH_NAMES
from conmoe_edge.checkpoint.tensors import tensor_reader as reader_module
from conmoe_edge.checkpoint.tensors.tensor_index import CheckpointIndex
from conmoe_edge.checkpoint.tensors.tensor_reader import LazyTensor, ShardReader
from conmoe_edge.errors import CheckpointError

FORMATS = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
]


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if not first.numel():
        return True
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One tensor of each format, of every sort of shape."""
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for code in FORMATS:
        dtype = getattr(torch, TORCH_NAMES[code])
        for name, shape in {
            "matrix": (5, 7),
            "cube": (3, 2, 4),
            "scalar": (),
            "none": (0, 3),
        }.items():
            values = torch.randint(0, 2, shape, generator=generator)
            tensors[f"{code}.{name}"] = values.to(dtype)
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(params=["positioned", "cursor"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read: the second is for systems without ``preadv`` and ``posix_fadvise``."""
    if request.param == "cursor":
        monkeypatch.delattr(os, "preadv")
        monkeypatch.delattr(os, "posix_fadvise")


@pytest.mark.usefixtures("way")
def test_every_format_and_shape(folder: Path) -> None:
    index = CheckpointIndex.open(folder)
    with ShardReader(index) as reader, safe_open(folder / "model.safetensors", "pt") as handle:
        assert len(reader) == 4 * len(FORMATS)
        for name in reader:
            lazy, expected, theirs = reader[name], handle.get_tensor(name), handle.get_slice(name)
            assert lazy.get_dtype() == theirs.get_dtype()
            assert list(lazy.get_shape()) == list(theirs.get_shape())
            assert (lazy.dtype, lazy.shape) == (expected.dtype, expected.shape)
            assert lazy.nbytes == expected.nbytes
            assert equal(lazy[...], expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "key",
    [
        0,
        -1,
        2,
        slice(1, 3),
        slice(None),
        slice(2, 2),
        slice(3, 1),
        slice(-2, None),
        slice(0, 99),
        slice(None, None, 2),
        (1, 1),
        (slice(1, 3), slice(0, 2)),
        (..., 0),
    ],
    ids=str,
)
def test_indices_mean_what_they_mean_for_a_tensor(key: object, folder: Path) -> None:
    with ShardReader(CheckpointIndex.open(folder)) as reader:
        for name in ("BF16.matrix", "F32.cube", "U8.cube"):
            assert equal(reader[name][key], reader[name][...][key])  # type: ignore[index]


def test_index_out_of_range(folder: Path) -> None:
    with ShardReader(CheckpointIndex.open(folder)) as reader, pytest.raises(IndexError):
        reader["F32.matrix"][5]


def test_rows_are_all_that_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = ShardReader.read

    def counting(self: ShardReader, entry: object, start: int, nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        return read(self, entry, start, nbytes)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardReader, "read", counting)
    with ShardReader(CheckpointIndex.open(folder)) as reader:
        _ = reader["F32.cube"][1]
        _ = reader["F32.cube"][1:3]
        _ = reader["F32.cube"][...]
    assert asked == [2 * 4 * 4, 2 * 2 * 4 * 4, 3 * 2 * 4 * 4]


def test_each_read_has_its_own_memory(folder: Path) -> None:
    with ShardReader(CheckpointIndex.open(folder)) as reader:
        first = reader["F32.matrix"][...]
        before = first.clone()
        first.add_(1)
        assert equal(reader["F32.matrix"][...], before)
    assert not equal(first, before)


@pytest.mark.usefixtures("way")
def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MOST_PER_CALL", 3)
    with ShardReader(CheckpointIndex.open(folder)) as reader:
        got = reader["F64.cube"][...]
    with safe_open(folder / "model.safetensors", "pt") as handle:
        assert equal(got, handle.get_tensor("F64.cube"))


@pytest.mark.usefixtures("way")
def test_many_threads(folder: Path) -> None:
    index = CheckpointIndex.open(folder)
    with safe_open(folder / "model.safetensors", "pt") as handle:
        expected = {name: handle.get_tensor(name) for name in index.tensors}
    with ShardReader(index) as reader, ThreadPoolExecutor(8) as threads:
        names = list(index.tensors) * 20
        for name, got in zip(names, threads.map(lambda n: reader[n][...], names), strict=True):
            assert equal(got, expected[name])


def test_file_that_shrinks_after_the_check(folder: Path) -> None:
    index = CheckpointIndex.open(folder)
    last = max(index.tensors.values(), key=lambda entry: entry.offset + entry.nbytes)
    with ShardReader(index) as reader:
        # Opened while it was whole, cut afterwards: only the read itself can notice.
        _ = reader["U8.matrix"][...]
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(last.offset + last.nbytes - 1)
        with pytest.raises(CheckpointError) as caught:
            _ = reader[last.name][...]
    assert last.name in caught.value.what and "model.safetensors" in caught.value.what
    assert "1 bytes" in caught.value.why


def test_file_that_changed_before_it_was_opened(folder: Path) -> None:
    index = CheckpointIndex.open(folder)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with ShardReader(index) as reader, pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _ = reader["U8.matrix"][...]


def test_file_that_is_gone(folder: Path) -> None:
    index = CheckpointIndex.open(folder)
    (folder / "model.safetensors").unlink()
    with ShardReader(index) as reader, pytest.raises(CheckpointError, match=r"U8\.matrix"):
        _ = reader["U8.matrix"][...]


def test_error_of_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reader_module, "read_at", broken)
    with (
        ShardReader(CheckpointIndex.open(folder)) as reader,
        pytest.raises(CheckpointError) as caught,
    ):
        _ = reader["U8.matrix"][...]
    assert caught.value.why == "Input/output error"


def test_closed_reader_and_its_descriptors(folder: Path) -> None:
    with ShardReader(CheckpointIndex.open(folder)) as reader:
        lazy = reader["U8.matrix"]
        _ = lazy[...]
        (file,) = reader._files.values()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.fd)
    with pytest.raises(ValueError, match="closed"):
        _ = lazy[...]


def test_format_that_torch_does_not_have(single: Path, raw_file: object) -> None:
    header = {"quarter": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    (single / "model.safetensors").write_bytes(raw_file(header, b"12"))  # type: ignore[operator]
    index = CheckpointIndex.open(single)
    with ShardReader(index) as reader, pytest.raises(CheckpointError) as caught:
        _ = reader["quarter"][...]
    assert "quarter" in caught.value.what and "F4" in caught.value.what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_a_model_from_lazy_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    """Renames and the fusing of experts are transformers' own; the slices it works on are ours."""
    from transformers import AutoModelForCausalLM, OlmoeConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = OlmoeConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(5)
    original = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    original.save_pretrained(tmp_path)
    index = CheckpointIndex.open(tmp_path)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in index.tensors

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    wanted = [name for name in index.tensors if name.startswith("model.layers.1.")]
    with ShardReader(index) as reader:
        convert_and_load_state_dict_in_model(
            model,
            {name: reader[name] for name in wanted},
            LoadStateDictConfig(
                weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
                dtype=dtype,
                device_map={"": "cpu"},
            ),
        )
    layer = dict(model.model.layers[1].named_parameters())
    assert all(parameter.device.type == "cpu" for parameter in layer.values())
    for name, expected in original.model.layers[1].named_parameters():
        assert equal(layer[name].detach(), expected.detach()), name
    assert model.model.layers[0].mlp.experts.gate_up_proj.device.type == "meta"


def test_lazy_tensor_says_what_it_is(folder: Path) -> None:
    with ShardReader(CheckpointIndex.open(folder)) as reader:
        lazy = reader["BF16.matrix"]
    assert isinstance(lazy, LazyTensor)
    assert repr(lazy) == "LazyTensor('BF16.matrix', BF16, [5, 7])"
