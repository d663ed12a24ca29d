"""Names, the hub's cache and failures, and no socket when offline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, errors

from conmoe_edge.checkpoint.sources import hub
from conmoe_edge.checkpoint.sources import model_names as names
from conmoe_edge.checkpoint.sources.locate import aliases, config_folder, describe, locate
from conmoe_edge.errors import CheckpointError, ModelNotFound, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT: Any = errors
"""Where the hub's client has the classes of its HTTP library, whichever that is."""


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this machine's config nor its hub cache nor its working folder takes part."""
    monkeypatch.setenv("CONMOE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def cached(sharded: Path, tmp_path: Path) -> Path:
    """``org/name`` in the hub's cache, laid out as the hub's own client does it."""
    repository = tmp_path / "cache" / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def own_aliases(text: str) -> None:
    folder = config_folder()
    folder.mkdir(exist_ok=True)
    (folder / "aliases.toml").write_text(text)


# Names


def test_the_demo_is_in_the_package() -> None:
    source = locate("demo", offline=True)
    assert (source.kind, source.revision, source.hub_id) == ("alias", None, None)
    assert (source.path / "config.json").is_file()


def test_folder(single: Path) -> None:
    source = locate(str(single))
    assert (source.name, source.kind, source.path) == (str(single), "path", single)


def test_relative_folder_and_folder_like_a_hub_id(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    single.rename(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate("org/name").path == tmp_path / "org" / "name"
    assert locate("./org/name").path == tmp_path / "org" / "name"


def test_stray_folder_does_not_hide_an_alias(single: Path) -> None:
    Path("olmoe").mkdir()
    assert names.resolve("olmoe").hub_id == "allenai/OLMoE-1B-7B-0924"
    (Path("olmoe") / "config.json").write_text("{}")
    assert names.resolve("olmoe").folder == Path("olmoe").absolute()


@pytest.mark.parametrize("alias", sorted(names._read_aliases(names._SHIPPED)))
def test_shipped_aliases_mean_something(alias: str) -> None:
    meaning = names.resolve(alias)
    assert meaning.kind == "alias"
    assert (meaning.hub_id is None) != (meaning.folder is None)


def test_own_aliases_win(single: Path) -> None:
    own_aliases(
        f'[aliases]\nmixtral = "me/mine@v2"\nlocal = "{single}"\nbroken = "not a model at all"\n'
    )
    meaning = names.resolve("Mixtral")
    assert (meaning.hub_id, meaning.revision) == ("me/mine", "v2")
    assert names.resolve("mixtral", "main").revision == "main"
    assert names.resolve("local").folder == single
    assert aliases()["olmoe"] == "allenai/OLMoE-1B-7B-0924"
    with pytest.raises(ModelNotFound) as caught:
        names.resolve("broken")
    assert "aliases.toml" in caught.value.fix


@pytest.mark.parametrize(
    "text", ["[aliases", "[aliases]\na = 7", 'aliases = "x"', "[aliases]\na = ''"]
)
def test_damaged_own_aliases(text: str) -> None:
    own_aliases(text)
    with pytest.raises(UsageError, match=r"aliases\.toml"):
        locate("demo")


def test_hub_ids() -> None:
    meaning = names.resolve("Qwen/Qwen3-30B-A3B@refs-1")
    assert (meaning.kind, meaning.hub_id, meaning.revision) == (
        "hub",
        "Qwen/Qwen3-30B-A3B",
        "refs-1",
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("olmo", "olmoe"),
        ("mixtrl", "mixtral"),
        ("qwen3", "qwen3-30b"),
        ("OLMOEE", "olmoe"),
        ("zzzz", "alias"),
        ("", "alias"),
        ("./nowhere", "path"),
        ("/nowhere/at/all", "path"),
        ("~nobody-at-all/x", "path"),
        ("a/b/c", "path"),
        ("C:\\models\\x", "path"),
        ("../../etc", ""),
        ("org/..", ""),
        ("x\0y", ""),
        ("x" * 5000, ""),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        locate(name, offline=True)
    assert hint in caught.value.fix and caught.value.fix
    assert "\n" not in caught.value.what


def test_file_in_place_of_its_folder(single: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        locate(str(single / "model.safetensors"))
    assert str(single) in caught.value.fix


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        locate(str(tmp_path))


def test_a_folder_has_no_revision(single: Path) -> None:
    for name in (str(single), "demo"):
        with pytest.raises(UsageError, match="folder"):
            locate(name, revision="main")


def test_config_folder_without_redirection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONMOE_CONFIG_DIR")
    assert config_folder().name == "conmoe-edge"


# Offline: any socket at all fails these tests


@pytest.mark.disable_socket
def test_offline_from_the_cache(cached: Path) -> None:
    source = locate("org/name", offline=True)
    assert (source.path, source.revision, source.hub_id) == (cached, COMMIT, "org/name")
    description = describe("org/name", offline=True)
    assert len(description.tensors) == 6 and description.revision == COMMIT


@pytest.mark.disable_socket
def test_offline_by_environment(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate("org/name").path == cached
    assert describe("org/name").path == cached


@pytest.mark.disable_socket
@pytest.mark.parametrize("function", [locate, describe])
def test_offline_and_not_in_the_cache(function: Any) -> None:
    for name in ("org/unknown", "olmoe"):
        with pytest.raises(ModelNotFound) as caught:
            function(name, offline=True)
        assert "cache" in caught.value.what and "--offline" in caught.value.fix


@pytest.mark.disable_socket
def test_offline_with_half_a_model(cached: Path) -> None:
    """As after ``plan``, which fetches the config alone."""
    next(cached.glob("*00002-of-00002.safetensors")).unlink()
    with pytest.raises(ModelNotFound, match="only partly"):
        locate("org/name", offline=True)


# The hub's failures


@pytest.fixture
def behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked before the hub's client tries."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")


@pytest.mark.disable_socket
@pytest.mark.usefixtures("behind_a_proxy")
def test_no_network_is_one_line_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        try:
            raise OSError("[Errno -2] Name or service not known")
        except OSError as error:
            raise CLIENT.HTTPError("a wrapper\nof several lines") from error

    for function in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{function}", unreachable)
    for call in (locate, describe):
        with pytest.raises(ModelNotFound) as caught:
            call("org/name")
        assert caught.value.why == "[Errno -2] Name or service not known"
        assert "--offline" in caught.value.fix and "connection" in caught.value.fix


def response(status: int) -> Any:
    # The request is only kept, so anything will do.
    return CLIENT.Response(status, request=SimpleNamespace(url="https://huggingface.co/x"))


@pytest.mark.usefixtures("behind_a_proxy")
@pytest.mark.parametrize(
    ("error", "expected", "word"),
    [
        (errors.RepositoryNotFoundError("404", response=response(404)), ModelNotFound, "no model"),
        (errors.GatedRepoError("403", response=response(403)), ModelNotFound, "terms"),
        (errors.RevisionNotFoundError("404", response=response(404)), ModelNotFound, "revision"),
        (errors.RemoteEntryNotFoundError("404", response=response(404)), CheckpointError, "lacks"),
        (errors.HfHubHTTPError("500\nmore", response=response(500)), ModelNotFound, "refused"),
        (errors.LocalEntryNotFoundError("gone"), ModelNotFound, "could not be fetched"),
        (errors.NotASafetensorsRepoError("no"), CheckpointError, "safetensors"),
        (errors.SafetensorsParsingError("bad"), CheckpointError, "damaged"),
        (errors.HFValidationError("bad"), ModelNotFound, "refused"),
        (ConnectionResetError("reset"), ModelNotFound, "could not be fetched"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_hub(
    error: Exception, expected: type[Exception], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(expected, match=word) as caught:
        locate("org/name", revision="v9")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("behind_a_proxy")
def test_mistakes_of_ours_are_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ZeroDivisionError):
        locate("org/name")


# Before any download


def test_describe_a_folder_sums_up_to_its_bytes(sharded: Path) -> None:
    description = describe(str(sharded))
    assert description.tensors["layers.0.weight"].dtype == "bfloat16"
    assert description.tensors["layers.0.weight"].shape == (6, 8)
    assert description.total_bytes == 2 * (6 * 8 * 2 + 5 * 4 + 3 * 8)


@pytest.fixture
def on_the_hub(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind_a_proxy: None
) -> Path:
    """``org/name`` on a hub whose files lie in ``sharded``; the cache has the config alone."""
    from huggingface_hub import get_local_safetensors_metadata

    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((sharded / "config.json").read_bytes())

    def download(hub_id: str, file: str, *, revision: str | None) -> str:
        assert (hub_id, file, revision) == ("org/name", "config.json", "main")
        return str(snapshot / file)

    def metadata(hub_id: str, *, revision: str | None) -> object:
        assert (hub_id, revision) == ("org/name", COMMIT), "the commit that the config is from"
        return get_local_safetensors_metadata(sharded)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    return sharded


def test_describe_before_any_download(on_the_hub: Path) -> None:
    remote, local = describe("org/name", revision="main"), describe(str(on_the_hub))
    assert remote.tensors == local.tensors and remote.total_bytes == local.total_bytes
    assert (remote.path.name, remote.revision, remote.hub_id) == (COMMIT, COMMIT, "org/name")


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]},
        {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4], "data_offsets": [0]},
        {"dtype": "U8", "shape": [1.5], "data_offsets": [0, 4]},
        {"dtype": "F12", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": ["4"], "data_offsets": [0, 4]},
        7,
    ],
)
def test_damaged_headers_on_the_hub(tensor: object, on_the_hub: Path, raw_file: Any) -> None:
    shard = on_the_hub / "model-00001-of-00002.safetensors"
    shard.write_bytes(raw_file({"layers.0.bias": tensor}, b"1234"))
    with pytest.raises(CheckpointError, match="org/name"):
        describe("org/name", revision="main")


def test_what_is_downloaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = {
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
        "README.md",
    }
    unwanted = {
        "additional_chat_templates/a/x.jinja",
        "additional_chat_templates/model.safetensors",
        "additional_chat_template/x.jinja",
        "add/x.jinja",
        "a/config.json",
        "pytorch_model.bin",
        "model.pt",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "modeling_deepseek.py",
        "original/model.safetensors",
        "original/config.json",
        "metal/model.bin",
        "figures/a.png",
    }
    got = filter_repo_objects(
        sorted(wanted | unwanted), allow_patterns=hub.ALLOWED, ignore_patterns=hub.IGNORED
    )
    assert set(got) == wanted


def test_whole_or_partly(cached: Path) -> None:
    assert hub.is_whole(cached)
    index = cached / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.unlink()
    assert not hub.is_whole(cached)
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "../../other.safetensors"}}))
    assert not hub.is_whole(cached)
    (cached / "config.json").unlink()
    assert not hub.is_whole(cached)
