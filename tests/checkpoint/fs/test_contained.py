"""A file of a model is a plain file in its folder, or in the hub's cache beside it; all else is refused unopened."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.fs import contained
from conmoe_edge.checkpoint.fs.contained import (
    check_entries,
    is_plain_name,
    is_there,
    open_inside,
    path_inside,
    read_inside,
)
from conmoe_edge.errors import CheckpointError

SECRET = b"the secret"
Plant = Callable[[Path, Path], None]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "secret"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "model"
    found.mkdir()
    (found / "config.json").write_bytes(b"{}")
    return found


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot of the hub's cache: one file, a link to its blob."""
    repository = tmp_path / "hub" / "models--org--name"
    found = repository / "snapshots" / "0123abcd"
    found.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "ab12").write_bytes(b"{}")
    (found / "config.json").symlink_to("../../blobs/ab12")
    return found


def refusal(folder: Path, name: str) -> CheckpointError:
    """All three ways to a file refuse it."""
    errors = []
    for read in (path_inside, open_inside, read_inside):
        with pytest.raises(CheckpointError) as caught:
            read(folder, name)
        errors.append(caught.value)
    assert SECRET.decode() not in str(errors)
    return errors[0]


def test_a_plain_file_and_a_link_beside_it(folder: Path) -> None:
    (folder / "link.json").symlink_to("config.json")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.json").write_bytes(b"[]")
    (folder / "deep.json").symlink_to("sub/deep.json")
    assert path_inside(folder, "config.json") == (folder / "config.json").resolve()
    assert read_inside(folder, "link.json") == b"{}"
    assert read_inside(folder, "deep.json") == b"[]"
    check_entries(folder)


def test_a_folder_that_is_itself_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert read_inside(tmp_path / "alias", "config.json") == b"{}"
    check_entries(tmp_path / "alias")


def straight(folder: Path, secret: Path) -> None:
    (folder / "x.json").symlink_to(secret)


def relative(folder: Path, secret: Path) -> None:
    (folder / "x.json").symlink_to(Path("..") / secret.parent.name / secret.name)


def by_a_chain(folder: Path, secret: Path) -> None:
    (folder / "x.json").symlink_to("y.json")
    (folder / "y.json").symlink_to(secret)


def through_a_folder(folder: Path, secret: Path) -> None:
    (folder / "sub").symlink_to(secret.parent)
    (folder / "x.json").symlink_to(f"sub/{secret.name}")


def beside_with_the_same_beginning(folder: Path, secret: Path) -> None:
    other = folder.with_name(folder.name + "-other")
    other.mkdir()
    (other / "file").write_bytes(SECRET)
    (folder / "x.json").symlink_to(other / "file")


def to_a_name_of_blobs(folder: Path, secret: Path) -> None:
    """Looks like the hub's cache, and is none."""
    fake = folder.parent.parent / "blobs"
    fake.mkdir()
    (fake / "ab12").write_bytes(SECRET)
    (folder / "x.json").symlink_to(fake / "ab12")


@pytest.mark.parametrize(
    "plant",
    [straight, relative, by_a_chain, through_a_folder, beside_with_the_same_beginning],
)
def test_links_out(plant: Plant, folder: Path, secret: Path) -> None:
    plant(folder, secret)
    assert "leaves" in refusal(folder, "x.json").what
    with pytest.raises(CheckpointError, match="leaves"):
        check_entries(folder)


def test_a_folder_called_snapshots_is_not_the_hub_cache(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "mine" / "snapshots" / "today"
    folder.mkdir(parents=True)
    to_a_name_of_blobs(folder, secret)
    assert "leaves" in refusal(folder, "x.json").what


def test_the_hub_cache(snapshot: Path) -> None:
    assert read_inside(snapshot, "config.json") == b"{}"
    extra = snapshot / "additional_chat_templates"
    extra.mkdir()
    (extra / "tools.jinja").symlink_to("../../../blobs/ab12")
    assert read_inside(extra, "tools.jinja") == b"{}"
    check_entries(snapshot)
    check_entries(extra)


def test_the_hub_cache_leads_nowhere_else(snapshot: Path, secret: Path) -> None:
    repository = snapshot.parent.parent
    (repository / "stray").write_bytes(SECRET)
    (repository / "blobs" / "deeper").mkdir()
    (repository / "blobs" / "deeper" / "ab12").write_bytes(SECRET)
    (repository.parent / "models--org--other" / "blobs").mkdir(parents=True)
    (repository.parent / "models--org--other" / "blobs" / "cd34").write_bytes(SECRET)
    (repository / "blobs" / "ef56").symlink_to(secret)
    for number, target in enumerate(
        [
            "../../stray",
            "../../blobs/deeper/ab12",
            "../../../models--org--other/blobs/cd34",
            "../../blobs/ef56",
        ]
    ):
        (snapshot / f"{number}.json").symlink_to(target)
        assert "leaves" in refusal(snapshot, f"{number}.json").what


def test_a_blobs_folder_that_is_a_link(snapshot: Path, secret: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(blobs.with_name("kept"))
    blobs.symlink_to(secret.parent)
    (snapshot / "x.json").symlink_to("../../blobs/secret")
    assert "leaves" in refusal(snapshot, "x.json").what


def test_links_that_lead_nowhere_or_in_a_circle(folder: Path) -> None:
    (folder / "gone.json").symlink_to("nothing.json")
    (folder / "loop.json").symlink_to("loop.json")
    assert "leads nowhere" in refusal(folder, "gone.json").why
    refusal(folder, "loop.json")
    assert is_there(folder, "gone.json") and is_there(folder, "loop.json")
    with pytest.raises(CheckpointError, match="gone"):
        check_entries(folder)


def test_pipes_sockets_devices_and_folders(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe.json")
    (folder / "link-to-pipe.json").symlink_to("pipe.json")
    (folder / "sub.json").mkdir()
    for name in ("pipe.json", "link-to-pipe.json", "sub.json"):
        assert "not a plain file" in refusal(folder, name).what
    (folder / "zero.json").symlink_to("/dev/zero")
    assert "leaves" in refusal(folder, "zero.json").what
    with pytest.raises(CheckpointError):
        check_entries(folder)


def test_a_socket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("x.json")
        assert "not a plain file" in refusal(folder, "x.json").what
        with pytest.raises(CheckpointError, match="not a plain file"):
            check_entries(folder)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../outside/secret",
        "sub/file.json",
        "/etc/passwd",
        "..\\outside\\secret",
        "C:secret",
        "file.json:stream",
        "a\0b",
        "a\nb",
        "file.json.",
        "file.json ",
        "NUL",
        "con.json",
        "lpt1.safetensors",
        "x" * 256,
        "ä" * 128,
        "\ud800.json",
    ],
)
def test_names_that_could_mean_something_else(name: str, folder: Path, secret: Path) -> None:
    assert not is_plain_name(name)
    (folder / "sub").mkdir()
    (folder / "sub" / "file.json").write_bytes(SECRET)
    assert "no name of a file" in refusal(folder, name).what


@pytest.mark.parametrize(
    "name", ["config.json", "modell-ä.safetensors", ".hidden", "a b.txt", "console.json", "x" * 255]
)
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


def test_a_missing_file_and_a_missing_folder(folder: Path, tmp_path: Path) -> None:
    assert "has no gone.json" in refusal(folder, "gone.json").what
    refusal(tmp_path / "nowhere", "config.json")
    assert not is_there(folder, "gone.json")
    with pytest.raises(CheckpointError):
        check_entries(tmp_path / "nowhere")


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **rest: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(contained.os, "open", denied)
    with pytest.raises(CheckpointError) as caught:
        read_inside(folder, "config.json")
    assert caught.value.why == "Permission denied"


def test_too_large(folder: Path) -> None:
    (folder / "big.json").write_bytes(b"x" * 11)
    assert read_inside(folder, "big.json", 11) == b"x" * 11
    with pytest.raises(CheckpointError, match="too large"):
        read_inside(folder, "big.json", 10)


def open_files() -> int:
    """Descriptors of this process; 0 where the system does not say."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


@pytest.mark.parametrize("swap", ["link", "pipe", "file", "folder above"])
def test_what_comes_between_the_decision_and_the_opening(
    swap: str, folder: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race, run on purpose: the file is replaced at the very moment before it is opened."""
    path, real_open = folder / "config.json", os.open

    def late(file: str | Path, *rest: int) -> int:
        path.unlink()
        if swap == "link":
            path.symlink_to(secret)
        elif swap == "pipe":
            os.mkfifo(path)
        elif swap == "file":
            path.write_bytes(SECRET)
        else:
            folder.rename(folder.with_name("moved"))
            (secret.parent / "config.json").write_bytes(SECRET)
            folder.symlink_to(secret.parent)
        return real_open(file, *rest)

    monkeypatch.setattr(contained.os, "open", late)
    before = open_files()
    with pytest.raises(CheckpointError):
        open_inside(folder, "config.json")
    assert open_files() == before


def test_entries_that_no_library_looks_for(folder: Path, secret: Path) -> None:
    (folder / ".#config.json").symlink_to("me@host.1234")  # an editor's lock
    (folder / "shared").symlink_to(secret.parent)  # a folder: never looked into
    (folder / ".git").mkdir()
    check_entries(folder)
