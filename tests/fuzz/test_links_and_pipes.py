"""Files of a package replaced at random by links, pipes, folders and circles: an error of ours, or the same model; and
nothing outside is opened.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from families import save_tokenizer, tiny_model
from fuzz.cases import random_of, seeds
from hand_packages import thirds, write_package
from opened_files import never_opened
from transformers import AutoModelForCausalLM

import conmoe_edge
from conmoe_edge.api.running import open_session
from conmoe_edge.errors import ConmoeError

IDS = torch.tensor([[5, 17, 33, 80]])
INVENTED = [
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.5.0.0.json",
    "custom_generate/generate.py",
    "additional_chat_templates/x.jinja",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "model.x.safetensors",
    "preprocessor_config.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "routing.safetensors",
    "predictor.safetensors",
    "constants.safetensors",
    "shard-00001-model-00001-of-00001.safetensors",
    "special_tokens_map.json",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.5.0.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("olmoe")
    folder = write_package(model, tmp_path_factory.mktemp("sound") / "package", thirds(model))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(sound: Path) -> torch.Tensor:
    with torch.no_grad():
        return conmoe_edge.load(sound, device="cpu")(IDS).logits


def spoil(folder: Path, outside: Path, random: Random) -> str:
    """Put something in the place of a file; what was done. What is outside has the file's own content."""
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    name = random.choice(there if random.random() < 0.5 else INVENTED)
    place, copy = folder / name, outside / name.replace("/", "-")
    if not copy.exists():
        if os.path.lexists(place) and not place.is_symlink() and place.is_file():
            shutil.copy(place, copy)
        else:
            copy.write_text("{}")
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    kind = random.choice(["link", "chain", "folder link", "pipe", "folder", "circle", "nowhere"])
    if kind == "link":
        place.symlink_to(copy if random.random() < 0.5 else os.path.relpath(copy, place.parent))
    elif kind == "chain":
        (folder / "between").unlink(missing_ok=True)
        (folder / "between").symlink_to(copy)
        place.symlink_to(folder / "between")
    elif kind == "folder link":
        (folder / "way").unlink(missing_ok=True)
        (folder / "way").symlink_to(outside)
        place.symlink_to(folder / "way" / copy.name)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(place.name if kind == "circle" else "nothing-there")
    return f"{name}: {kind}"


@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", seeds(12))
def test_a_spoilt_package(seed: int, sound: Path, wanted: torch.Tensor, tmp_path: Path) -> None:
    random = random_of(seed)
    folder, outside = Path(shutil.copytree(sound, tmp_path / "package")), tmp_path / "outside"
    outside.mkdir()
    done = [spoil(folder, outside, random) for _ in range(random.choice([1, 1, 2, 3]))]
    # transformers reads these two before it calls anything of ours.
    own_door = not any(one.startswith("config.json") for one in done)
    with never_opened(sorted(outside.iterdir())):
        for door in ("load", "session", "transformers"):
            try:
                if door == "load":
                    model = conmoe_edge.load(folder, device="cpu")
                elif door == "session":
                    model = open_session(folder, device="cpu").model
                elif own_door:
                    model = AutoModelForCausalLM.from_pretrained(folder)
                else:
                    continue
            except ConmoeError as error:
                assert error.what, done
                continue
            with torch.no_grad():
                assert torch.equal(model(IDS).logits, wanted), (door, done)
            model.conmoe.close()
