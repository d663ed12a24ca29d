"""Packages whose files are sound in themselves and say something else than the manifest: refused where they are opened,
with the file and the tensor.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz.package_mutations import agree, edit_values, joined, put, split
from hand_packages import predict
from safetensors.torch import load_file, save_file

from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.compress.stream.streamed_model import open_subject
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.simulate.load_settings import read_trace
from conmoe_edge.report.package_summary import summarise

WRITTEN = Path(__file__).parents[1] / "data" / "packages" / "0.1.0"
CONSTANTS, FACTORED, INT8 = "olmoe-auto-bf16", "olmoe-mc-smoe", "mixtral-mone-int8-dense-int8"
Copy = Callable[[str], Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    def made(name: str) -> Path:
        return Path(shutil.copytree(WRITTEN / name, tmp_path / name))

    return made


def resaved(folder: Path, file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)
    agree(folder)


def refused(folder: Path, *words: str, slots: tuple[int, ...] | None = None) -> None:
    with pytest.raises(PackageError) as error:
        load_package(folder, device="cpu", slots=slots)
    told = f"{error.value.what} {error.value.why}"
    assert all(word in told for word in words), told


CONSTANT_EDITS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "narrow": lambda t: t.update({"constants.0": t["constants.0"][:, :1].contiguous()}),
    "wide": lambda t: t.update({"constants.0": torch.cat([t["constants.0"]] * 2, 1)}),
    "few rows": lambda t: t.update({"constants.0": t["constants.0"][:-1].contiguous()}),
    "flat": lambda t: t.update({"constants.0": t["constants.0"].flatten()}),
    "format": lambda t: t.update({"constants.0": t["constants.0"].half()}),
    "nan": lambda t: t["constants.0"].view(-1)[3:4].fill_(float("nan")),
    "gone": lambda t: t.pop("constants.0"),
    "another": lambda t: t.update({"constants.7": torch.zeros(1, 64)}),
}


@pytest.mark.parametrize("edit", CONSTANT_EDITS)
def test_constants(copy: Copy, edit: str) -> None:
    """Rows of one number passed once, and were read as rows of the model's width."""
    folder = copy(CONSTANTS)
    resaved(folder, "constants.safetensors", CONSTANT_EDITS[edit])
    refused(folder, "constants.safetensors", "constants.7" if edit == "another" else "constants.0")
    with pytest.raises(PackageError), open_subject(folder, torch.device("cpu")):
        pass  # the door of eval


@pytest.mark.parametrize("scale", [1e308, -1e308, 3.5e38])
def test_a_scale_beyond_fp32(copy: Copy, scale: float) -> None:
    folder = copy(CONSTANTS)
    path = folder / "conmoe.json"
    manifest = json.loads(path.read_text())
    manifest["scales"] = {"0": [scale] * len(manifest["remap"]["0"])}
    path.write_text(json.dumps(manifest))
    refused(folder, "conmoe.json", "scales.0")


PREDICTOR_EDITS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "another width": lambda t: t.update({"predictor.1": t["predictor.1"][:-8].contiguous()}),
    "prototypes": lambda t: t.update({"predictor.1": t["predictor.1"][:, :-1].contiguous()}),
    "format": lambda t: t.update({"predictor.1": t["predictor.1"].float()}),
    "inf": lambda t: t["predictor.1"].view(-1)[:1].fill_(float("inf")),
    "gone": lambda t: t.pop("predictor.1"),
    "another": lambda t: t.update({"predictor.0": torch.zeros(1).bfloat16()}),
}


@pytest.mark.parametrize("edit", PREDICTOR_EDITS)
def test_predictor(copy: Copy, edit: str) -> None:
    folder = copy(CONSTANTS)
    predict(folder, 2, 0.5, 64)
    resaved(folder, "predictor.safetensors", PREDICTOR_EDITS[edit])
    refused(folder, "predictor.safetensors", "predictor.0" if edit == "another" else "predictor.1")


ROUTING_EDITS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a slot beyond": lambda t: t["routing.0"].view(-1)[:1].fill_(9),
    "below zero": lambda t: t.update({"routing.0": t["routing.0"].to(torch.int16).neg()}),
    "more choices than slots": lambda t: t.update({"routing.0": t["routing.0"].repeat(1, 9)}),
    "a token less": lambda t: t.update({"routing.0": t["routing.0"][:-1].contiguous()}),
    "format": lambda t: t.update({"routing.0": t["routing.0"].float()}),
    "no tokens": lambda t: t["sequences"].zero_(),
    "wrapped": lambda t: t["sequences"].fill_(2**31 - 1),
    "another": lambda t: t.update({"routing.5": t["routing.0"].clone()}),
}


@pytest.mark.parametrize("edit", ROUTING_EDITS)
def test_routing(copy: Copy, edit: str) -> None:
    folder = copy(CONSTANTS)
    assert read_trace(folder, load_manifest(folder)) is not None
    resaved(folder, "routing.safetensors", ROUTING_EDITS[edit])
    refused(folder, "routing.safetensors", slots=(2, 2))
    with pytest.raises(PackageError):
        summarise(folder)


def header_edit(
    folder: Path, file: str, edit: Callable[[dict[str, dict[str, object]]], None]
) -> None:
    data = (folder / file).read_bytes()
    table, values = split(data)
    edit(table)
    put(folder / file, joined(table, values, struct.unpack("<Q", data[:8])[0]))
    agree(folder)


def test_records_that_lie_elsewhere_than_the_manifest_says(copy: Copy) -> None:
    folder = copy(CONSTANTS)

    def swap(table: dict[str, dict[str, object]]) -> None:
        first, second = sorted(name for name in table if name != "__metadata__")[:2]
        table[first], table[second] = table[second], table[first]

    header_edit(folder, "prototypes-00000.safetensors", swap)
    refused(folder, "prototypes-00000.safetensors", "prototypes.0.", "lies at byte")
    with pytest.raises(PackageError), open_subject(folder, torch.device("cpu")):
        pass


def test_columns_beyond_the_matrix(copy: Copy) -> None:
    folder = copy(FACTORED)
    manifest = load_manifest(folder)
    entry = manifest.prototypes[0]
    columns = next(
        one for one in manifest.layouts[entry.layout].parts if one.name == "gate_up_proj.columns"
    )

    def edit(record: bytearray) -> None:
        end = columns.offset + columns.nbytes
        record[end - 4 : end] = struct.pack("<i", 2**31 - 1)

    name = f"prototypes.{entry.id.layer}.{entry.id.expert}"
    edit_values(folder / entry.file, name, edit)
    agree(folder)
    refused(folder, entry.file, "gate_up_proj.columns", str(list(entry.id)))
    device = torch.device("cpu")
    with (
        open_subject(folder, device) as subject,
        pytest.raises(PackageError, match="damaged"),
        subject.layer(entry.id.layer, Clock()),
    ):
        pass


DENSE = "dense-00001-of-00001.safetensors"


def test_dense_weights_in_a_format_that_means_nothing_alone(copy: Copy) -> None:
    folder = copy(CONSTANTS)
    name = "model.layers.0.self_attn.q_proj.weight"

    def edit(table: dict[str, dict[str, object]]) -> None:
        rows, columns = table[name]["shape"]  # type: ignore[misc]
        table[name] |= {"dtype": "I16", "shape": [rows, columns]}

    header_edit(folder, DENSE, edit)
    refused(folder, name, "I16")


def test_int8_weights_whose_scales_are_others(copy: Copy) -> None:
    folder = copy(INT8)
    name = next(one for one in load_file(folder / DENSE) if one.endswith("_scale"))
    header_edit(folder, DENSE, lambda table: table[name].update({"dtype": "I16"}))
    refused(folder, name.removesuffix("_scale"), "I8")


@pytest.mark.parametrize("which", ["model.norm.weight", "q_proj.weight_scale"])
def test_rows_that_hold_nan(copy: Copy, which: str) -> None:
    folder = copy(INT8)
    name = next(one for one in sorted(load_file(folder / DENSE)) if one.endswith(which))
    edit_values(folder / DENSE, name, lambda part: part.__setitem__(slice(0, 2), b"\xc0\x7f"))
    agree(folder)
    refused(folder, name, "NaN")


@pytest.mark.parametrize("what", ["dense", "record", "nothing"])
def test_verify_looks_at_every_number(copy: Copy, what: str) -> None:
    folder = copy(CONSTANTS)
    file, name = (
        (DENSE, "lm_head.weight")
        if what == "dense"
        else (
            "prototypes-00001.safetensors",
            sorted(load_file(folder / "prototypes-00001.safetensors"))[-1],
        )
    )
    if what != "nothing":
        edit_values(
            folder / file, name, lambda part: part.__setitem__(slice(1024, 1026), b"\x80\x7f")
        )
        agree(folder)
        assert summarise(folder).verified is False  # sizes alone say nothing
        with pytest.raises(PackageError) as error:
            summarise(folder, verify=True)
        place = name if what == "dense" else str([int(one) for one in name.split(".")[1:]])
        assert place in error.value.why and "NaN or infinity" in error.value.why
    else:
        assert summarise(folder, verify=True).verified
