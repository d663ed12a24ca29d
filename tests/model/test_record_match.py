"""Records against the experts module of a layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from hand_packages import identity, write_package

from conmoe_edge.checkpoint.format.dtypes import nbytes_of
from conmoe_edge.checkpoint.format.manifest import Manifest, RecordPart
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import PackageError
from conmoe_edge.model.experts import find_experts, part_names
from conmoe_edge.model.record_match import PLAIN_FORMATS, check_records


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("olmoe")


@pytest.fixture(scope="module", params=["plain", "int8"])
def manifest(
    model: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Manifest:
    folder = tmp_path_factory.mktemp("package")
    return load_manifest(write_package(model, folder, identity(model), kind=request.param))


def checked(
    model: Any, manifest: Manifest, *parts: RecordPart, without: tuple[str, ...] = ()
) -> None:
    """The check of layer 0 where the records have other ``parts`` under these names."""
    layout = manifest.layouts[0]
    new = {part.name: part for part in layout.parts if part.name not in without}
    new |= {part.name: part for part in parts}
    changed = replace(manifest, layouts=(replace(layout, parts=tuple(new.values())),))
    module = find_experts(model)[0][1]
    check_records(Path("out"), changed, 0, module, part_names(module))


def part(manifest: Manifest, name: str) -> RecordPart:
    return next(one for one in manifest.layouts[0].parts if one.name == name)


def test_records_as_they_are_written(model: Any, manifest: Manifest) -> None:
    checked(model, manifest)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize(
    "dtype",
    ["float64", "bool", "complex64", "int64", "int32", "int16", "float8_e4m3fn", "float8_e5m2"],
)
def test_a_format_that_no_backend_computes_with(
    model: Any, manifest: Manifest, name: str, dtype: str
) -> None:
    one = part(manifest, name)
    other = replace(one, dtype=dtype, nbytes=nbytes_of(dtype, one.shape))
    with pytest.raises(PackageError, match=f"layer 0 expects {name}"):
        checked(model, manifest, other)


def test_formats_that_every_backend_computes_with(model: Any, manifest: Manifest) -> None:
    if part(manifest, "down_proj").dtype not in PLAIN_FORMATS:
        return
    for dtype in PLAIN_FORMATS:
        checked(model, manifest, replace(part(manifest, "down_proj"), dtype=dtype))


def test_a_part_that_the_layer_has_not(model: Any, manifest: Manifest) -> None:
    extra = replace(part(manifest, "down_proj"), name="down_proj_bias")
    with pytest.raises(PackageError, match="hold 'down_proj_bias', which it has not"):
        checked(model, manifest, extra)


def test_values_without_scales_and_scales_of_another_number(model: Any, manifest: Manifest) -> None:
    if part(manifest, "down_proj").dtype != "int8":
        return
    with pytest.raises(PackageError, match="layer 0 expects down_proj"):
        checked(model, manifest, without=("down_proj.scale",))
    scale = part(manifest, "down_proj.scale")
    for shape, dtype in (
        ((1,), "bfloat16"),
        ((*scale.shape, 1), "bfloat16"),
        (scale.shape, "float32"),
    ):
        with pytest.raises(PackageError, match="layer 0 expects down_proj"):
            checked(model, manifest, replace(scale, shape=shape, dtype=dtype))


def test_a_prototype_that_no_slot_uses_is_looked_at_as_well(model: Any, tmp_path: Path) -> None:
    manifest = load_manifest(write_package(model, tmp_path / "out", identity(model)))
    layout = manifest.layouts[0]
    wrong = replace(layout, parts=tuple(replace(one, dtype="bool") for one in layout.parts))
    unused = manifest.prototypes[0]
    row = [replace(slot, prototype=manifest.prototypes[1].id) for slot in manifest.slots[0]]
    changed = replace(
        manifest,
        layouts=(layout, wrong),
        prototypes=(replace(unused, layout=1), *manifest.prototypes[1:]),
        slots={**manifest.slots, 0: tuple(row)},
    )
    module = find_experts(model)[0][1]
    with pytest.raises(PackageError, match="layer 0 expects"):
        check_records(Path("out"), changed, 0, module, part_names(module))
