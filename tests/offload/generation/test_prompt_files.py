"""Prompts in files: what was written is what is read, and nothing else is ever used."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME
from conmoe_edge.errors import UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.prefix_chunks import HeldChunk, LayerForm
from conmoe_edge.offload.generation.prompt_files import (
    DamagedPrompt,
    PromptCacheWarning,
    PromptFiles,
)
from conmoe_edge.offload.generation.prompt_identity import prompt_identity
from conmoe_edge.offload.generation.session import ChatSession
from tests.families import VOCAB, tiny_model
from tests.hand_packages import identity, write_package
from tests.scores import Turn, alone, turn

CHUNK, CONTEXT, CHUNKS = 16, 400, 4
FORM = (LayerForm("rows"),)


def packaged(family: str, folder: Path, **more: Any) -> Path:
    plain = tiny_model(family, dtype=torch.bfloat16, max_position_embeddings=512, **more)
    return write_package(plain, folder, identity(plain), prefill_chunk=CHUNK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged("gpt_oss", tmp_path_factory.mktemp("package"), sliding_window=40)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    loaded: Any = load_package(folder, context=CONTEXT, device="cpu")
    yield loaded
    loaded.conmoe.close()


@pytest.fixture(scope="module")
def asked(model: Any) -> Turn:
    prompt = torch.randint(
        3, VOCAB, (CHUNKS * CHUNK + 7,), generator=torch.Generator().manual_seed(1)
    )
    return alone(model, prompt.tolist(), 30)


class Kept:
    """A session with files in a folder, and what was told."""

    def __init__(self, model: Any, folder: Path, **settings: Any) -> None:
        self.told: list[str] = []
        self.files = PromptFiles.of_model(model, folder, tell=self.told.append, **settings)
        self.session = ChatSession(model, None, files=self.files)

    def known(self, wanted: Turn) -> int:
        """Of the prompt, the tokens that were known; the answer is the one that is wanted."""
        known = self.session.greedy(wanted[0], 1).reused
        found = turn(self.session, wanted[0], len(wanted[1]))
        assert found[1] == wanted[1]
        assert torch.equal(found[2], wanted[2])
        return known


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir() if one.name != "lock")


def test_a_later_session_begins_with_what_an_earlier_one_computed(
    model: Any, asked: Turn, tmp_path: Path
) -> None:
    first = Kept(model, tmp_path / "kept")
    assert first.known(asked) == 0
    assert len(names(tmp_path / "kept")) == CHUNKS
    second = Kept(model, tmp_path / "kept")
    assert second.known(asked) == CHUNKS * CHUNK
    assert second.files.hits == CHUNKS and second.files.read_bytes > 0
    assert second.files.written_bytes == 0 and not first.told and not second.told


@pytest.mark.parametrize(
    ("family", "more", "kept"),
    [
        ("olmoe", {}, "int8"),
        ("deepseek_v3", {}, "source"),
        ("qwen3_next", {}, "source"),
        ("lfm2_moe", {}, "source"),
        ("gpt_oss", {"sliding_window": 8}, "int8"),
    ],
)
def test_after_a_new_start_too(family: str, more: Any, kept: str, tmp_path: Path) -> None:
    """Loaded anew, with other slots: rows, states, windows, bytes."""
    folder = packaged(family, tmp_path / "package", **more)
    prompt = torch.randint(3, VOCAB, (CHUNKS * CHUNK + 1,)).tolist()
    wanted: Turn | None = None
    for slots in ((24,), (2,)):
        model: Any = load_package(
            folder, context=CONTEXT, device="cpu", slots=slots, kv_precision=kept
        )
        wanted = wanted or alone(model, prompt, 40)
        known = Kept(model, tmp_path / "kept").known(wanted)
        assert known == (CHUNKS * CHUNK if slots == (2,) else 0)
        model.conmoe.close()


def test_another_prompt_begins_with_what_both_have(model: Any, asked: Turn, tmp_path: Path) -> None:
    Kept(model, tmp_path).known(asked)
    other = alone(model, asked[0][: 2 * CHUNK + 3] + [7] * 30, 10)
    assert Kept(model, tmp_path).known(other) == 2 * CHUNK
    assert len(names(tmp_path)) == CHUNKS + 1 + (2 * CHUNK + 3 + 30) // CHUNK - 3
    assert Kept(model, tmp_path).known(asked) == CHUNKS * CHUNK


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def one_bit(at: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 4
        path.write_bytes(data)

    return change


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"0.0": torch.zeros(1, 2, CHUNK, 8), "0.1": torch.zeros(1, 2, CHUNK, 8)}, path)


def pickled(path: Path) -> None:
    torch.save({"0.0": torch.zeros(2)}, path)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link(path: Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def exchanged(path: Path) -> None:
    """The file of another chunk, whole, under this one's name."""
    other = next(one for one in path.parent.glob("*.safetensors") if one != path)
    shutil.copyfile(other, path)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 64)


DAMAGES = {
    "cut off": cut_off,
    "empty": empty,
    "foreign": foreign,
    "pickle": pickled,
    "pipe": a_pipe,
    "link": a_link,
    "exchanged": exchanged,
    "longer": longer,
    **{f"one bit at {at}": one_bit(at) for at in (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.995, 1.0)},
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("place", [0, CHUNKS - 1])
def test_what_is_damaged_is_told_of_and_not_used(
    what: str, place: int, model: Any, asked: Turn, tmp_path: Path
) -> None:
    home = tmp_path / "kept"
    first = Kept(model, home)
    first.known(asked)
    path = home / f"{first.files._keys(asked[0])[place]}.safetensors"
    DAMAGES[what](path)
    second = Kept(model, home)
    known = second.known(asked)  # the answer is the same
    if not second.told:  # spaces behind the header's JSON are no part of it
        assert what.startswith("one bit") and known == CHUNKS * CHUNK
        return
    assert known == place * CHUNK
    assert len(second.told) == 1 and str(path) in second.told[0]
    assert Kept(model, home).known(asked) == CHUNKS * CHUNK, "it was computed and written again"


def test_the_warning_has_a_class_of_its_own(model: Any, asked: Turn, tmp_path: Path) -> None:
    files = PromptFiles.of_model(model, tmp_path)
    alone_with_files = ChatSession(model, None, files=files)
    turn(alone_with_files, asked[0], 1)
    for path in tmp_path.glob("*.safetensors"):
        cut_off(path)
    again = ChatSession(model, None, files=PromptFiles.of_model(model, tmp_path))
    with pytest.warns(PromptCacheWarning, match="was ignored"):
        found = turn(again, asked[0], len(asked[1]))
    assert torch.equal(found[2], asked[2])


def test_another_package_finds_nothing(
    folder: Path, asked: Turn, model: Any, tmp_path: Path
) -> None:
    Kept(model, tmp_path / "kept").known(asked)
    for change in ("manifest", "weights", "again"):
        copy = Path(shutil.copytree(folder, tmp_path / change))
        if change == "manifest":
            value = json.loads((copy / MANIFEST_NAME).read_text())
            (copy / MANIFEST_NAME).write_text(json.dumps(value, indent=3))
        elif change == "weights":
            path = next(copy.glob("dense*.safetensors"))
            os.utime(path, ns=(1, 1))
        other: Any = load_package(copy, context=CONTEXT, device="cpu")
        expected = CHUNKS * CHUNK if change == "again" else 0
        assert Kept(other, tmp_path / "kept").known(asked) == expected
        other.conmoe.close()


def test_what_the_bits_depend_on_is_in_the_identity(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads(prompt_identity(model))
    assert before["source"] and before["processor"] and before["versions"]["torch"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("CONMOE_API_KEY", "secret")
    changed = json.loads(prompt_identity(model))
    assert changed["variables"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "secret" not in json.dumps(changed)
    packed: Any = load_package(folder, context=CONTEXT, device="cpu", kv_precision="int8")
    assert json.loads(prompt_identity(packed))["kv_precision"] == "int8"
    assert prompt_identity(packed) != prompt_identity(model)
    packed.conmoe.close()


def test_files_and_folder_are_the_users_alone(model: Any, asked: Turn, tmp_path: Path) -> None:
    home = tmp_path / "new" / "kept"
    before = os.umask(0)
    try:
        Kept(model, home).known(asked)
    finally:
        os.umask(before)
    assert home.stat().st_mode & 0o777 == 0o700
    assert {one.stat().st_mode & 0o777 for one in home.iterdir()} == {0o600}
    assert len(names(home)) == CHUNKS


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_to_is_refused(
    mode: int, model: Any, tmp_path: Path
) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(UsageError, match="Others may write") as error:
        PromptFiles.of_model(model, tmp_path)
    assert "chmod 700" in error.value.fix


def small(folder: Path, most: int) -> PromptFiles:
    return PromptFiles(folder, "x", torch.device("cpu"), 2, most_bytes=most, tell=print)


def held(value: float) -> HeldChunk:
    return HeldChunk([(torch.full((1, 1, 2, 64), value), torch.full((1, 1, 2, 64), value))], True)


def test_the_longest_unused_goes_and_ends_go_before_beginnings(tmp_path: Path) -> None:
    probe = small(tmp_path / "probe", 1 << 30)
    probe.write([1, 2], held(0))
    size = sum(one.stat().st_size for one in (tmp_path / "probe").glob("*.safetensors"))
    files = small(tmp_path / "kept", 4 * size + size // 2)
    files.write([1, 2], held(1))
    files.write([1, 2, 3, 4], held(2))
    files.write([5, 6], held(3))
    assert len(files.further([], [1, 2, 3, 4, 9], FORM)) == 2  # used after the third
    for start in (10, 20):
        files.write([start, start], held(start))
    assert not files.further([], [5, 6, 9], FORM)
    assert len(files.further([], [1, 2, 3, 4, 9], FORM)) == 2
    for start in (30, 40, 50):
        files.write([start, start], held(start))
    assert len(files.further([], [1, 2, 3, 4, 9], FORM)) == 1, "the end went first"
    total = sum(one.stat().st_size for one in (tmp_path / "kept").glob("*.safetensors"))
    assert total <= 4 * size + size // 2


def test_a_prompt_longer_than_the_folder_keeps_its_beginning(tmp_path: Path) -> None:
    files = small(tmp_path, 3000)
    prompt: list[int] = []
    for value in range(20):
        prompt += [value, value]
        files.write(prompt, held(value))
    kept = files.further([], [*prompt, 9], FORM)
    assert 0 < len(kept) < 20
    assert [float(one.layer(0)[0][0, 0, 0, 0]) for one in kept] == list(range(len(kept)))


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    files = small(tmp_path, 1 << 20)
    left = tmp_path / ("a" * 64 + ".safetensors.tmp")
    left.write_bytes(b"x" * 100)
    other = tmp_path / "notes.txt.tmp"
    other.write_text("not ours")
    files.write([1, 2], held(1))
    assert not left.exists() and other.exists()


def test_several_write_and_read_at_once(tmp_path: Path) -> None:
    """Each with a lock of its own, as other processes have; the folder is too small for all."""
    wrong: list[Any] = []

    def work(seed: int) -> None:
        files = small(tmp_path, 6000)
        try:
            for round_ in range(12):
                prompt: list[int] = []
                for value in range(3):
                    prompt += [value, (seed + round_) % 4 if value else 0]
                    files.write(prompt, held(sum(prompt)))
                for i, one in enumerate(files.further([], [*prompt, 9], FORM)):
                    try:
                        value = float(one.layer(0)[0][0, 0, 0, 0])
                    except DamagedPrompt:  # another took it away
                        break
                    if value != sum(prompt[: 2 * i + 2]):
                        wrong.append((prompt, i, value))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
    assert not list(tmp_path.glob("*.tmp"))


def test_a_disk_that_cannot_be_written_costs_nothing_but_the_files(
    model: Any, asked: Turn, tmp_path: Path
) -> None:
    kept = Kept(model, tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / "kept").write_text("no folder")
    assert kept.known(asked) == 0
    assert len(kept.told) == 1 and "No more prompts are kept" in kept.told[0]


def test_keys_do_not_depend_on_what_was_asked_before(tmp_path: Path) -> None:
    """A chunk that two prompts have at one place has another key where what comes before it differs."""
    used = PromptFiles(tmp_path / "used", "x", torch.device("cpu"), 2)
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [9, 9, 3, 4, 5, 6], [1, 2, 9, 9, 5, 6], [1, 2, 3]]
    for prompt in [*prompts, *reversed(prompts)]:
        fresh = PromptFiles(tmp_path / "fresh", "x", torch.device("cpu"), 2)
        keys = fresh._keys(prompt)
        assert used._keys(tuple(prompt)) == keys
        assert len(keys) == len(prompt) // 2
    assert len({used._keys(prompt)[-1] for prompt in prompts}) == len(prompts)
