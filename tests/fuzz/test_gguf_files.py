"""Damaged and hostile GGUF files: ``plan`` ends with a result or an error of ours, soon and in little memory.

``CONMOE_FUZZ_CASES=5000 pytest tests/fuzz/test_gguf_files.py`` runs many; a failure names its seed, and
``CONMOE_FUZZ_SEED`` runs that case alone.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from random import Random

import pytest
from fuzz.cases import random_of, seeds
from fuzz.forked_command import run_command
from fuzz.test_configs import fault
from gguf_files import ARCHITECTURES, all_of, plain_model, write_gguf
from transformers import AutoConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

NUMBERS = (0, 1, 2, 3, 31, 32, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 64) - 1)

NAMES = (b"blk.0.", b"general.architecture", b"qwen3moe.", b"olmoe.", b"tokenizer.ggml", b"weight")


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child leaves that was ended."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A file of each architecture."""
    found = []
    for kind in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(kind)
        layers = 2 if kind.startswith("deepseek") else 1  # its first one has no experts
        plain = plain_model(kind, folder / "plain", num_hidden_layers=layers)
        config = AutoConfig.from_pretrained(folder / "plain")
        write_gguf(folder / "a.gguf", kind, config, plain, all_of("Q4_0"))
        found.append((folder / "a.gguf").read_bytes())
    return found


def damaged(data: bytes, random: Random) -> tuple[bytes, str]:
    """A file with one to four changes, most of them in its header, and what they are."""
    content = bytearray(data)
    done = []
    header = data.index(b"token_embd.weight") + 4000
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        end = random.choice((64, 600, header, header, len(content)))
        at = random.randrange(max(1, min(end, len(content) - 8)))
        how = random.choice(("byte", "number", "number", "bit", "cut", "double", "name", "swap"))
        if how == "byte":
            content[at] = random.randrange(256)
        elif how == "bit":
            content[at] ^= 1 << random.randrange(8)
        elif how == "number":
            code = random.choice("IQ")
            number = random.choice(NUMBERS) % (1 << (32 if code == "I" else 64))
            content[at : at + struct.calcsize(code)] = struct.pack(f"<{code}", number)
        elif how == "cut":
            del content[at:]
        elif how == "double":
            content[at:at] = content[at : at + random.randrange(1, 200)]
        elif how == "name":
            name = random.choice([one for one in NAMES if one in content] or [bytes(content[:4])])
            content[content.index(name)] = random.randrange(32, 127)
        elif len(content) > at + 64:
            content[at : at + 8], content[at + 32 : at + 40] = (
                content[at + 32 : at + 40],
                content[at : at + 8],
            )
        done.append(f"{how} at {at}")
        if len(content) < 32:
            break
    return bytes(content), ", ".join(done)


def test_damaged_gguf_files(whole: list[bytes], tmp_path: Path) -> None:
    os.environ["CONMOE_CACHE_DIR"] = str(tmp_path / "cache")
    from conmoe_edge import api

    (tmp_path / "warm.gguf").write_bytes(whole[0])
    api.plan(str(tmp_path / "warm.gguf"), budget="4GB", device="cpu")  # before the first fork
    faults = []
    for seed in seeds(12):
        random = random_of(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        data, done = damaged(random.choice(whole), random)
        (folder / "a.gguf").write_bytes(data)
        screen = folder / "screen"
        screen.mkdir()
        words = ["plan", str(folder / "a.gguf"), "--gpu", "4GB", "--device", "cpu", "--offline"]
        outcome = run_command(words, screen)
        if why := fault(outcome):
            faults.append(f"seed {seed}: {done}\n  {why}\n  {outcome.err[-900:]}")
        shutil.rmtree(folder)
    assert not faults, "\n".join(faults)


def test_whole_files_pass(whole: list[bytes], tmp_path: Path) -> None:
    """Otherwise the fuzzer would test refusals alone."""
    for number, data in enumerate(whole):
        (tmp_path / "a.gguf").write_bytes(data)
        screen = tmp_path / str(number)
        screen.mkdir()
        words = ["plan", str(tmp_path / "a.gguf"), "--gpu", "4GB", "--device", "cpu", "--offline"]
        outcome = run_command(words, screen)
        assert outcome.status == 0 and not fault(outcome), outcome
