"""A package to a hub and back, over real HTTP: what arrives is what was sent, and nothing else is fetched or kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from families import tiny_model
from hand_packages import thirds, write_package
from hub_upload import WritableHub
from huggingface_hub import constants
from local_hub import Fault, bytes_file, folder_repository, local_hub

from conmoe_edge import api
from conmoe_edge.checkpoint.format.manifest import UNCHANGED
from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest
from conmoe_edge.errors import (
    HubRefused,
    ModelNotFound,
    OutputExists,
    PackageError,
    UsageError,
)

NAME = "org/small"
TOKEN = "hf_test"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("olmoe")
    return write_package(model, tmp_path_factory.mktemp("made") / "out", thirds(model))


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "package")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    hub = WritableHub(token=TOKEN)
    with local_hub(hub, tmp_path / "cache", monkeypatch) as serving:
        hub.endpoint = serving.endpoint
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not HTTP
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_and_back(package: Path, hub: WritableHub, tmp_path: Path) -> None:
    (package / "secret.txt").write_text("no part of the package")
    sent = api.push(package, NAME)
    assert hub.private == {NAME} and len(hub.commits) == 1
    assert sent.commit == hub.commit and sent.url == f"{hub.endpoint}/{NAME}"
    there = set(hub.repositories[NAME])
    assert there == {*sent.files, "README.md", ".gitattributes"} and "secret.txt" not in there
    got = api.pull(NAME, tmp_path / "got")
    (package / "secret.txt").unlink()
    assert content(tmp_path / "got") == content(package)
    assert (got.commit, got.nbytes, set(got.files)) == (hub.commit, sent.nbytes, set(sent.files))
    assert {path.name for path in tmp_path.iterdir()} <= {"package", "got", "cache"}
    with pytest.raises(OutputExists):
        api.pull(NAME, tmp_path / "got")
    api.pull(NAME, tmp_path / "got", overwrite=True)


def test_an_earlier_packages_weights_go(package: Path, hub: WritableHub) -> None:
    api.push(package, NAME, public=True)
    files = hub.repositories[NAME]
    hub.repositories[NAME] = {**files, "prototypes-00009.safetensors": bytes_file(b"old")}
    sent = api.push(package, NAME, public=True, revision="v2")
    assert set(hub.repositories[NAME]) == {*sent.files, "README.md", ".gitattributes"}
    assert hub.branches == [(NAME, "v2")] and hub.commits[1][1] == "v2"


def test_a_dry_run_opens_no_socket(package: Path, hub: WritableHub) -> None:
    shown = api.push(package, NAME, dry_run=True)
    assert hub.asked == [] and shown.url is None and "conmoe-edge pull org/small" in shown.card


def test_without_a_token(package: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubRefused) as caught:
        api.push(package, NAME)
    assert "hf auth login" in caught.value.fix and hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubRefused) as caught:
        api.push(package, NAME)
    assert "hf auth login" in caught.value.fix and hub.repositories == {}


def test_what_is_no_whole_package_stays(package: Path, hub: WritableHub, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no package"):
        api.push(tmp_path, NAME)
    path = package / "prototypes-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match="checksum"):
        api.push(package, NAME)
    path.unlink()
    with pytest.raises(PackageError, match="missing"):
        api.push(package, NAME)
    assert hub.asked == []


def test_who_sees_a_repository_is_not_changed(package: Path, hub: WritableHub) -> None:
    api.push(package, NAME, public=True)
    with pytest.raises(UsageError, match="everybody"):
        api.push(package, NAME)
    api.push(package, "org/other")
    with pytest.raises(UsageError, match="only its owner"):
        api.push(package, "org/other", public=True)
    assert len(hub.commits) == 2


def test_somebody_elses_repository_is_left_alone(package: Path, hub: WritableHub) -> None:
    hub.repositories[NAME] = {"model.safetensors": bytes_file(b"years of work", large=True)}
    with pytest.raises(HubRefused, match="no package"):
        api.push(package, NAME, public=True)
    assert hub.commits == []


def test_an_upload_that_fails_shows_nothing_and_goes_on(package: Path, hub: WritableHub) -> None:
    hub.no_put = 1
    with pytest.raises(HubRefused) as caught:
        api.push(package, NAME)
    assert "again" in caught.value.fix and hub.commits == []
    kept = dict(hub.objects)
    api.push(package, NAME)
    assert len(hub.commits) == 1 and kept.items() <= hub.objects.items()


def test_a_model_left_as_it_was_does_not_travel(package: Path, hub: WritableHub) -> None:
    manifest = replace(
        load_manifest(package), method=UNCHANGED, prototypes=(), slots={}, originals={}
    )
    save_manifest(package, manifest)
    with pytest.raises(PackageError, match="left as it was"):
        api.push(package, NAME)
    hub.repositories[NAME] = folder_repository(package)
    with pytest.raises(PackageError, match="left as it was"):
        api.pull(NAME, package.parent / "got")
    assert hub.weight_bytes() == 0


@pytest.mark.parametrize(
    "name", ["modeling_evil.py", "weights.bin", "LICENSE.SH", "evil.pyc", "a.dll"]
)
def test_code_is_never_fetched(name: str, package: Path, hub: WritableHub, tmp_path: Path) -> None:
    manifest = load_manifest(package)
    facts = {"size": 3, "sha256": "0" * 64}
    save_manifest(package, replace(manifest, files={**manifest.files, name: facts}))
    (package / name).write_bytes(b"123")
    hub.repositories[NAME] = folder_repository(package)
    with pytest.raises(PackageError, match=name):
        api.pull(NAME, tmp_path / "got")
    assert not any(one.path.endswith(name) for one in hub.asked)
    assert not (tmp_path / "got").exists()


def test_a_file_beside_the_manifest_is_not_fetched(
    package: Path, hub: WritableHub, tmp_path: Path
) -> None:
    (package / "tokenizer.py").write_text("import os")
    hub.repositories[NAME] = folder_repository(package)
    api.pull(NAME, tmp_path / "got")
    assert not any("tokenizer.py" in one.path for one in hub.asked)


def test_a_wrong_byte_is_found_and_only_that_file_comes_anew(
    package: Path, hub: WritableHub, tmp_path: Path
) -> None:
    right = folder_repository(package)
    name = "prototypes-00001-of-00001.safetensors"
    data = bytearray((package / name).read_bytes())
    data[-1] ^= 1
    hub.repositories[NAME] = {**right, name: bytes_file(bytes(data), large=True)}
    with pytest.raises(PackageError, match="checksum"):
        api.pull(NAME, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    hub.repositories[NAME] = right
    hub.forget()
    api.pull(NAME, tmp_path / "got")
    assert content(tmp_path / "got") == content(package)
    assert set(hub.served) == {name}


def test_a_fetch_that_stops_goes_on_with_what_is_missing(
    package: Path, hub: WritableHub, tmp_path: Path
) -> None:
    hub.repositories[NAME] = files = folder_repository(package)
    name = "prototypes-00001-of-00001.safetensors"
    hub.faults = [Fault(name, status=403)]
    with pytest.raises(ModelNotFound):
        api.pull(NAME, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    hub.faults = []
    hub.forget()
    api.pull(NAME, tmp_path / "got")
    assert content(tmp_path / "got") == content(package)
    assert hub.served == {name: files[name].size}


def test_without_a_connection_the_fix_is_one_that_pull_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_hub(WritableHub(), tmp_path / "cache", monkeypatch):
        pass  # it is gone again, and everything still leads to it
    with pytest.raises(ModelNotFound) as caught:
        api.pull(NAME, tmp_path / "got")
    assert "--offline" not in caught.value.fix and "again" in caught.value.fix


def test_names_and_what_they_lead_to(hub: WritableHub, tmp_path: Path) -> None:
    for name in ("olmoe", "../x", "a/b/c", ""):
        with pytest.raises(UsageError, match="owner/name"):
            api.pull(name, tmp_path / "got")
    with pytest.raises(ModelNotFound):
        api.pull("org/nothing", tmp_path / "got")
    hub.repositories[NAME] = {"config.json": bytes_file(b"{}")}
    with pytest.raises(PackageError) as caught:
        api.pull(NAME, tmp_path / "got")
    assert caught.value.fix == f"Make one of it with: conmoe-edge fit {NAME}"
    assert list(tmp_path.glob("*got*")) == []


def test_the_card_names_the_original_and_its_licence(package: Path) -> None:
    manifest = load_manifest(package)
    source = {"name": "olmoe", "revision": "c0" * 20, "fingerprint": "0"}
    save_manifest(package, replace(manifest, source=source, receipt={"kl": 0.5, "tokens": 9}))
    (package / "MODEL_CARD.md").write_text("---\nlicense: apache-2.0\n---\n# OLMoE\n")
    card = api.push(package, NAME, dry_run=True).card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "allenai/OLMoE-1B-7B-0924"
    assert front["license"] == "apache-2.0" and front["library_name"] == "conmoe-edge"
    assert "| all |  |  |  | 0.5000 |  |" in card
    save_manifest(
        package, replace(manifest, source={**source, "name": "my/folder", "revision": None})
    )
    (package / "MODEL_CARD.md").write_text("---\nlicense: [\n---\n")
    shown = api.push(package, NAME, dry_run=True)
    front = yaml.safe_load(shown.card.split("---\n")[1])
    assert "base_model" not in front and "license" not in front
    assert "my/folder" in shown.notes[0] and "my/folder" not in shown.card
    assert json.dumps(front)
