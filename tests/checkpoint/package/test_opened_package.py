"""What ``open_package`` checked is what is run: one folder, one manifest, its own weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from families import tiny_model
from hand_packages import identity, write_package
from safetensors.torch import load_file, save_file

from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest
from conmoe_edge.checkpoint.package.opened_package import open_package
from conmoe_edge.errors import PackageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.integrations.vllm.layer_stacks import NotServable
from conmoe_edge.integrations.vllm.stacked_weights import package_folder

DENSE = "dense-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("olmoe")
    folder = tmp_path_factory.mktemp("sound") / "package"
    return write_package(model, folder, identity(model), hub_names=True)


@pytest.fixture
def package(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "package"))


def refusal(folder: Path) -> PackageError:
    with pytest.raises(PackageError) as caught:
        open_package(folder)
    assert caught.value.what and caught.value.fix
    with pytest.raises(PackageError):
        package_folder(str(folder))  # vLLM's door
    return caught.value


def test_a_sound_package(package: Path, tmp_path: Path) -> None:
    opened = open_package(package, deep=True)
    assert set(opened.index.files) == {DENSE}
    assert opened.manifest == load_manifest(package)
    (tmp_path / "alias").symlink_to(package)
    assert opened.is_in(tmp_path / "alias") and not opened.is_in(tmp_path)


def test_a_package_in_the_hub_cache(package: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(package.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    assert load_package(snapshot, device="cpu").conmoe.stats().slots == 24
    assert package_folder(str(snapshot)) == snapshot.resolve()


@pytest.mark.parametrize(
    "name", ["extra.safetensors", "model.fp16.safetensors", "MODEL.SAFETENSORS", "w.bin", "a.PT"]
)
def test_weights_that_the_manifest_does_not_name(name: str, package: Path) -> None:
    shutil.copy(package / DENSE, package / name)
    assert name in refusal(package).what


def test_weights_that_only_the_index_names(package: Path) -> None:
    manifest = load_manifest(package)
    files = {name: facts for name, facts in manifest.files.items() if name != DENSE}
    save_manifest(package, replace(manifest, files=files))
    assert DENSE in refusal(package).what


def test_two_sets_of_weights_that_the_manifest_names(package: Path) -> None:
    """transformers would take ``model.safetensors``, and the index says otherwise."""
    save_file(load_file(package / DENSE), package / "model.safetensors")
    manifest = load_manifest(package)
    size = (package / "model.safetensors").stat().st_size
    more = {"model.safetensors": {"size": size, "sha256": "0" * 64}}
    save_manifest(package, replace(manifest, files={**manifest.files, **more}))
    assert "two sets" in refusal(package).what


@pytest.mark.parametrize("target", ["../beside.safetensors", "sub/dense.safetensors", "w.bin"])
def test_an_index_that_leads_away(target: str, package: Path) -> None:
    weight_map = json.loads((package / INDEX).read_text())["weight_map"]
    text = json.dumps({"weight_map": dict.fromkeys(weight_map, target)})
    manifest = load_manifest(package)
    (package / INDEX).write_text(text)
    facts = {**manifest.files[INDEX], "size": len(text)}
    save_manifest(package, replace(manifest, files={**manifest.files, INDEX: facts}))
    refusal(package)


def test_what_is_no_folder_or_no_package(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PackageError, match="is no package"):
            open_package(folder)
    with pytest.raises(NotServable, match="is not a folder"):
        package_folder("org/name")
