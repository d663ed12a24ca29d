"""No file outside a model's or a package's folder is read, by any door; no pickle is opened; what was checked is run.

Every attack is made on a sound folder that then opens by the same door, and the kernel tells whether a file was opened.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from families import save_tiny, save_tokenizer, tiny_model
from hand_packages import identity, thirds, write_package
from opened_files import never_opened
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import conmoe_edge
from conmoe_edge.checkpoint.format.manifest import UNCHANGED, Manifest
from conmoe_edge.checkpoint.package.manifest_io import save_manifest
from conmoe_edge.cli.main import main
from conmoe_edge.errors import ConmoeError

SECRET = "secret-7f3a"
INDEX = "model.safetensors.index.json"
DENSE = "dense-00001-of-00001.safetensors"
Attack = Callable[[Path, Path], None]

pytestmark = pytest.mark.timeout(120)


class Ran:
    """What a pickle may do: leave a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def sound_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("olmoe", tmp_path_factory.mktemp("sound") / "source")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sound_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("olmoe")
    folder = write_package(model, tmp_path_factory.mktemp("sound") / "package", thirds(model))
    save_tokenizer(folder)
    return folder


@pytest.fixture
def source(sound_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_source, tmp_path / "given" / "source"))


@pytest.fixture
def package(sound_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_package, tmp_path / "given" / "model"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "secret"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def command(*words: str | Path) -> str:
    """Run one; it must end with a clean error. What it printed."""
    done = CliRunner().invoke(main, [str(word) for word in words], input="")
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2), (done.exit_code, done.output)
    assert "error: " in done.output and "Traceback" not in done.output
    assert "not foreseen" not in done.output, done.output
    return done.output


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """Call one; it must raise an error of ours. What that says."""
    with pytest.raises(ConmoeError) as error:
        function(*arguments, **named)
    assert error.value.exit_code in (1, 2)
    return f"{error.value.what} {error.value.why} {error.value.fix}"


def fit(folder: Path) -> str:
    out = folder.parent.parent / "out"
    words = [
        "fit",
        folder,
        "--out",
        out,
        "--gpu",
        "4GB",
        "--device",
        "cpu",
        "--rate",
        "50%",
        "--yes",
    ]
    said = command(*words, "--calibration-tokens", "512")
    assert not out.exists()
    return said


def plan(folder: Path) -> str:
    return command("plan", folder, "--gpu", "4GB", "--device", "cpu")


SOURCE_DOORS = {"fit": fit, "plan": plan}
PACKAGE_DOORS: dict[str, Callable[[Path], str]] = {
    "chat": lambda folder: command("chat", folder, "--prompt", "a", "--device", "cpu"),
    "serve": lambda folder: command("serve", folder, "--port", "0", "--device", "cpu"),
    "inspect": lambda folder: command("inspect", folder),
    "export": lambda folder: command("export", folder, folder.parent.parent / "plain"),
    "eval": lambda folder: command("eval", folder, "--against", "none", "--device", "cpu"),
    "load": lambda folder: call(conmoe_edge.load, folder, device="cpu"),
    "transformers": lambda folder: call(AutoModelForCausalLM.from_pretrained, folder),
}


def check(door: Callable[[Path], str], folder: Path, secret: Path, *more: Path) -> str:
    """Go in by ``door``: refused, nothing of the secret read, said or written, no pickle run. What it said."""
    mark = secret.with_name("ran")
    with never_opened([secret, *more]):
        said = door(folder)
    assert SECRET not in said
    for path in secret.parent.parent.rglob("*"):
        if path.is_file() and not path.is_symlink() and path not in (secret, *more):
            assert SECRET.encode() not in path.read_bytes(), path
    assert not mark.exists()
    return said


def linked(name: str) -> Attack:
    def attack(folder: Path, secret: Path) -> None:
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(secret)

    return attack


def setting(name: str, **values: Any) -> Attack:
    """``values`` in a JSON file; ``OUT`` in them becomes the path of the secret."""

    def attack(folder: Path, secret: Path) -> None:
        path = folder / name
        text = json.dumps(values).replace("OUT", str(secret))
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**before, **json.loads(text)}))

    return attack


def piped(name: str) -> Attack:
    def attack(folder: Path, secret: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return attack


def pickled(name: str, *, alone: bool = False) -> Attack:
    def attack(folder: Path, secret: Path) -> None:
        (folder / name).write_bytes(pickle.dumps({"w": Ran(secret.with_name("ran"))}))
        if alone:
            (folder / INDEX).unlink(missing_ok=True)
            (folder / "model.safetensors").unlink(missing_ok=True)

    return attack


def index_names(target: str) -> Attack:
    """The index leads to ``target`` instead of to the shards; the weights are moved there, or a pickle is put."""

    def attack(folder: Path, secret: Path) -> None:
        single = folder / "model.safetensors"
        weights = single if single.exists() else folder / DENSE
        names = list(load_file(weights))
        place = folder / target
        place.parent.mkdir(exist_ok=True)
        shutil.move(weights, place)
        if target.endswith(".bin"):
            place.write_bytes(pickle.dumps({"w": Ran(secret.with_name("ran"))}))
        index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(names, target)}
        (folder / INDEX).write_text(json.dumps(index))

    return attack


SOURCE_ATTACKS: dict[str, Attack] = {
    **{
        name: linked(name)
        for name in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            INDEX,
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "chat_template.jinja",
            "additional_chat_templates/tools.jinja",
            "processor_config.json",
            "LICENSE",
            "README.md",
        )
    },
    "pipe": piped("chat_template.jinja"),
    "adapter": setting("adapter_config.json", base_model_name_or_path="OUT"),
    "another config": setting("config.json", configuration_files=["config.4.0.0.json"]),
    "other weights": setting("config.json", transformers_weights="consolidated.safetensors"),
    "tokenizer above": setting(
        "tokenizer_config.json", fast_tokenizer_files=["../../outside/tokenizer.4.0.json"]
    ),
    "vocabulary": setting("special_tokens_map.json", vocab_file="OUT"),
    "vocabulary again": setting("tokenizer_config.json", vocab="OUT"),
    "pickle": pickled("pytorch_model.bin", alone=True),
    "index of pickle": index_names("w.bin"),
    "index above": index_names("../beside.safetensors"),
    "index below": index_names("sub/model.safetensors"),
}


@pytest.mark.parametrize("door", SOURCE_DOORS)
@pytest.mark.parametrize("name", SOURCE_ATTACKS)
def test_a_source(name: str, door: str, source: Path, secret: Path) -> None:
    SOURCE_ATTACKS[name](source, secret)
    check(SOURCE_DOORS[door], source, secret)


PACKAGE_ATTACKS: dict[str, Attack] = {
    **{
        name: linked(name)
        for name in (
            "config.json",
            "conmoe.json",
            INDEX,
            DENSE,
            "prototypes-00001-of-00001.safetensors",
            "generation_config.json",
            "tokenizer.json",
            "chat_template.jinja",
            "additional_chat_templates/tools.jinja",
            "MODEL_CARD.md",
        )
    },
    "pipe": piped("generation_config.json"),
    "manifest as pipe": piped("conmoe.json"),
    "adapter": setting("adapter_config.json", base_model_name_or_path="OUT"),
    "other weights": setting("config.json", transformers_weights=DENSE),
    "vocabulary": setting("special_tokens_map.json", vocab_file="OUT"),
    "pickle": pickled("pytorch_model.bin", alone=True),
    "pickle beside": pickled("pytorch_model.bin"),
    "index of pickle": index_names("w.bin"),
    "index above": index_names("../beside.safetensors"),
}


def second_manifest(folder: Path, secret: Path) -> None:
    """The shards in a folder below, with a manifest of their own: one would be checked, and the other run."""
    index_names("sub/dense.safetensors")(folder, secret)
    model = tiny_model("olmoe")
    other = write_package(model, folder.parent / "other", identity(model))
    shutil.copy(other / "conmoe.json", folder / "sub")
    for path in other.glob("prototypes-*"):
        shutil.copy(path, folder / "sub")
    shutil.rmtree(other)


def second_weights(folder: Path, secret: Path) -> None:
    """transformers takes ``model.safetensors`` where both are there, whatever the index says."""
    tensors = {name: tensor * 2 for name, tensor in load_file(folder / DENSE).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_many_ranks(folder: Path, secret: Path) -> None:
    """transformers prefers such files to all others."""
    shutil.copy(folder / DENSE, folder / "shard-00001-model-00001-of-00001.safetensors")


PACKAGE_ATTACKS |= {
    "second manifest": second_manifest,
    "second weights": second_weights,
    "of many ranks": of_many_ranks,
}


@pytest.mark.parametrize("door", PACKAGE_DOORS)
@pytest.mark.parametrize("name", PACKAGE_ATTACKS)
def test_a_package(name: str, door: str, package: Path, secret: Path) -> None:
    if (name, door) == ("config.json", "transformers"):
        pytest.skip("transformers reads config.json before it knows whose package it is")
    PACKAGE_ATTACKS[name](package, secret)
    if name == "manifest as pipe" and door == "eval":
        said = check(PACKAGE_DOORS[door], package, secret)
        assert "conmoe.json" in said  # and not measured as a model that is no package
        return
    check(PACKAGE_DOORS[door], package, secret)


def test_the_sound_ones_open(source: Path, package: Path, secret: Path, tmp_path: Path) -> None:
    """What the attacks are made on is refused by no door; links of their own do not matter."""
    (package / "real.jinja").write_text("{{ messages }}")
    (package / "chat_template.jinja").symlink_to("real.jinja")
    with never_opened([secret]):
        assert conmoe_edge.load(package, device="cpu").conmoe.stats().slots == 9
        AutoModelForCausalLM.from_pretrained(package)
        for words in (["inspect", package], ["export", package, tmp_path / "plain"]):
            done = CliRunner().invoke(main, [str(word) for word in words])
            assert done.exit_code == 0, done.output
        done = CliRunner().invoke(
            main, ["plan", str(source), "--gpu", "4GB", "--device", "cpu", "--json"]
        )
        assert done.exit_code == 0, done.output


def without_dtype(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("named", [True, False], ids=["dtype", "no dtype"])
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
@pytest.mark.parametrize("way", ["subfolder", "variant", "config"])
def test_arguments_that_lead_to_other_weights(
    way: str, kind: str, named: bool, package: Path, secret: Path, tmp_path: Path
) -> None:
    """What transformers resolves is not what the index names: refused before any of it is opened."""
    other = Path(
        shutil.copytree(
            package, package / "sub" if way == "subfolder" else tmp_path / "given" / "b"
        )
    )
    if not named:
        without_dtype(package)
        without_dtype(other)
    given, arguments = package, {}
    weights = other / DENSE
    if kind == "pickle":
        weights = other / "pytorch_model.bin"
        pickled("pytorch_model.bin", alone=True)(other, secret)
    if way == "subfolder":
        arguments = {"subfolder": "sub"}
    elif way == "config":
        arguments = {"config": config_of(package)}
        given = other
        if (
            kind == "safetensors"
        ):  # a sound package with the config of another one, which is the same
            AutoModelForCausalLM.from_pretrained(given, **arguments)
            return
    else:
        name = "pytorch_model.x.bin" if kind == "pickle" else "model.x.safetensors"
        shutil.copy(weights, package / name)
        weights = package / name
        arguments = {"variant": "x"}
    check(
        lambda folder: call(AutoModelForCausalLM.from_pretrained, folder, **arguments),
        given,
        secret,
        weights,
    )


def config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_leave_to_unpickle_is_not_given(package: Path) -> None:
    said = call(AutoModelForCausalLM.from_pretrained, package, weights_only=False)
    assert "weights_only" in said


def test_a_package_without_a_number_format(package: Path) -> None:
    """transformers need not look into a file for it, and finds the same."""
    wanted = AutoModelForCausalLM.from_pretrained(package).dtype
    without_dtype(package)
    assert AutoModelForCausalLM.from_pretrained(package).dtype == wanted
    assert conmoe_edge.load(package, device="cpu").dtype == wanted


@pytest.fixture
def unchanged(source: Path) -> Path:
    """A package of a model that fits as it is."""
    manifest = Manifest(
        source={
            "name": "tiny",
            "fingerprint": {
                "files": {
                    "model.safetensors": {"size": (source / "model.safetensors").stat().st_size}
                }
            },
        },
        method=UNCHANGED,
        rate=0.0,
        scope=1,
        precision="source",
        layouts=(),
        prototypes=(),
        slots={},
        files={},
        plan={},
        tool_version="0.1.0",
    )
    save_manifest(source, manifest)
    return source


@pytest.mark.parametrize("door", ["chat", "inspect", "load"])
@pytest.mark.parametrize("name", ["model.safetensors", "pickle", "of many ranks", "smaller"])
def test_an_unchanged_model(name: str, door: str, unchanged: Path, secret: Path) -> None:
    weights = unchanged / "model.safetensors"
    if name == "model.safetensors":
        shutil.move(weights, secret.with_name("weights"))
        weights.symlink_to(secret.with_name("weights"))
        said = check(PACKAGE_DOORS[door], unchanged, secret, secret.with_name("weights"))
        assert "--overwrite" in said  # how to mend a package of an earlier version
        return
    if name == "pickle":
        pickled("pytorch_model.bin", alone=True)(unchanged, secret)
    elif name == "of many ranks":
        shutil.copy(weights, unchanged / "shard-00001-model-00001-of-00001.safetensors")
    else:
        tensors = load_file(weights)
        save_file({name: tensors[name][:1] for name in tensors}, weights)
    check(PACKAGE_DOORS[door], unchanged, secret)


def test_an_unchanged_model_opens(unchanged: Path) -> None:
    assert conmoe_edge.load(unchanged, device="cpu").conmoe is not None


def test_the_watch_sees_an_opening(secret: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(secret)
    with pytest.raises(pytest.fail.Exception), never_opened([secret]):
        (tmp_path / "link").read_bytes()
