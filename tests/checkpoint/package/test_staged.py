"""The output folder is whole or absent: whenever a run is killed, and whoever else wants it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conmoe_edge.checkpoint.fs import durable
from conmoe_edge.checkpoint.fs.atomic_files import write_bytes
from conmoe_edge.checkpoint.package.staged import StagedFolder
from conmoe_edge.errors import InUse, OutputExists, ResumeMismatch, UsageError
from tests.patience import PATIENCE

SETTINGS = {"rate": 0.25, "plan": {"scope": 1}}


def build(target: Path, text: str = "new", **options: bool) -> None:
    with StagedFolder(target, SETTINGS, **options) as staged:
        write_bytes(staged.path / "conmoe.json", text.encode())
        write_bytes(staged.path / "data", text.encode() * 1000)
        write_bytes(staged.work / "journal", b"secret")
        staged.commit()


def is_whole(target: Path, text: str) -> bool:
    return {path.name: path.read_text() for path in target.iterdir()} == {
        "conmoe.json": text,
        "data": text * 1000,
    }


def test_commit_leaves_the_package_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    build(target)
    assert is_whole(target, "new")
    assert list(target.parent.iterdir()) == [target]


def test_without_commit_the_target_is_absent_and_the_work_waits(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with StagedFolder(target, SETTINGS) as staged:
        assert not staged.resumed
        (staged.path / "part").write_text("1")
        (staged.work / "journal").write_text("2")
    assert not target.exists()
    with StagedFolder(target, dict(reversed(SETTINGS.items()))) as staged:
        assert staged.resumed
        assert (staged.path / "part").read_text() == "1"
        assert (staged.work / "journal").read_text() == "2"
        staged.discard()
        assert not staged.path.exists()
    with StagedFolder(target, SETTINGS) as staged:
        assert not staged.resumed and not list(staged.path.iterdir())


def test_exception_keeps_the_work(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StagedFolder(tmp_path / "out", SETTINGS) as staged:
        (staged.path / "part").write_text("1")
        raise KeyboardInterrupt
    with StagedFolder(tmp_path / "out", SETTINGS) as staged:
        assert staged.resumed and (staged.path / "part").exists()


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with StagedFolder(target, SETTINGS) as staged:
        (staged.path / "part").write_text("1")
    changed = {"rate": 0.5, "plan": {"scope": 1}, "seed": 7}
    with pytest.raises(ResumeMismatch) as caught, StagedFolder(target, changed):
        pass
    assert "rate was 0.25, now 0.5" in caught.value.why
    assert "seed was not set, now 7" in caught.value.why
    assert "scope" not in caught.value.why and "--fresh" in caught.value.fix
    with StagedFolder(target, SETTINGS) as staged:
        assert staged.resumed, "a refusal must not cost the work"
    with StagedFolder(target, changed, fresh=True) as staged:
        assert not staged.resumed
    assert len(list(tmp_path.iterdir())) == 1


def test_fresh_starts_over(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out", SETTINGS) as staged:
        (staged.path / "part").write_text("1")
    with StagedFolder(tmp_path / "out", SETTINGS, fresh=True) as staged:
        assert not staged.resumed and not list(staged.path.iterdir())


def test_existing_package_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out"
    build(target, "old")
    with pytest.raises(OutputExists) as caught:
        build(target)
    assert "--overwrite" in caught.value.fix
    assert is_whole(target, "old")
    build(target, overwrite=True)
    assert is_whole(target, "new")
    assert list(tmp_path.iterdir()) == [target]


def test_target_that_appears_during_the_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with StagedFolder(target, SETTINGS) as staged:
        write_bytes(staged.path / "conmoe.json", b"{}")
        target.mkdir()
        (target / "sentinel").write_text("mine")
        with pytest.raises(OutputExists):
            staged.commit()
    assert (target / "sentinel").read_text() == "mine"


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "documents"
    target.mkdir()
    (target / "thesis.txt").write_text("years")
    with pytest.raises(OutputExists, match="no package"):
        build(target, overwrite=True)
    assert (target / "thesis.txt").read_text() == "years"
    assert list(tmp_path.iterdir()) == [target]


def test_an_empty_folder_is_replaced_with_overwrite_only(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(OutputExists):
        build(target)
    build(target, overwrite=True)
    assert is_whole(target, "new")


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputExists):
        build(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["/", "x\0y"])
def test_names_that_are_no_folder(name: str) -> None:
    with pytest.raises(UsageError):
        StagedFolder(Path(name), SETTINGS)


def test_names_with_the_signs_of_a_pattern(tmp_path: Path) -> None:
    build(tmp_path / "out[1]*")
    build(tmp_path / "out[1]*", "again", overwrite=True)
    assert is_whole(tmp_path / "out[1]*", "again")


def test_link_to_a_package_is_followed(tmp_path: Path) -> None:
    build(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and is_whole(tmp_path / "real", "new")


def test_two_runs_at_once(tmp_path: Path) -> None:
    program = f"""
        import sys, pathlib
        from conmoe_edge.checkpoint.package.staged import StagedFolder
        with StagedFolder(pathlib.Path({str(tmp_path / "out")!r}), {SETTINGS!r}):
            print("ready", flush=True)
            sys.stdin.readline()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert other.stdin and other.stdout
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(InUse) as caught:
        build(tmp_path / "out")
    assert str(other.pid) in caught.value.why
    # Another output beside it is free.
    build(tmp_path / "other")
    other.communicate("go\n", timeout=PATIENCE)
    build(tmp_path / "out")
    assert is_whole(tmp_path / "out", "new")


def test_lock_of_a_killed_process_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("1\n")
    build(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_half_written_files_do_not_travel(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out", SETTINGS) as staged:
        (staged.path / "conmoe.json").write_text("{}")
        (staged.path / "big.safetensors.tmp").write_text("half")
        staged.commit()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["conmoe.json"]


def run(target: Path, overwrite: bool, crash_at: int | None = None) -> int:
    """A run like a real one, in a process of its own; forked, since Python takes long to start.

    Returns its exit status: 0 done, 9 refused because the target exists, 137 killed.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        durable._steps = itertools.count(1)
        os.environ.pop(durable.CRASH_VARIABLE, None)
        if crash_at is not None:
            os.environ[durable.CRASH_VARIABLE] = str(crash_at)
        with StagedFolder(target, SETTINGS, overwrite=overwrite) as staged:
            journal = staged.work / "journal"
            if not journal.exists():
                write_bytes(staged.path / "data", b"new" * 1000)
                write_bytes(journal, b"done")
            write_bytes(staged.path / "conmoe.json", b"new")
            staged.commit()
        status = 0
    except OutputExists:
        status = 9
    finally:
        os._exit(status)


def test_the_crash_hook_counts_and_kills_at_once(tmp_path: Path) -> None:
    program = (
        "import pathlib\n"
        "from conmoe_edge.checkpoint.fs.atomic_files import write_bytes\n"
        f"for n in range(3): write_bytes(pathlib.Path({str(tmp_path)!r}, str(n)), b'x')"
    )
    # Three steps a file: content, name, folder. The seventh is the content of the third file.
    environment = {**os.environ, "CONMOE_CRASH_AT": "7"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == 137
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2.tmp"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("overwrite", [False, True], ids=["absent", "overwrite"])
def test_killed_at_every_durable_step(overwrite: bool, tmp_path: Path) -> None:
    """After a kill, the target is whole (old or new) or absent; the next run finishes."""
    step, absent = 0, 0
    while True:
        step += 1
        folder = tmp_path / str(step)
        target = folder / "out"
        folder.mkdir()
        if overwrite:
            build(target, "old")
        status = run(target, overwrite, crash_at=step)
        if status == 0:
            break
        assert status == 137
        if target.exists():
            assert is_whole(target, "new") or (overwrite and is_whole(target, "old"))
        else:
            # With an old package, the one moment without a target is between the two renames of the
            # commit, and then the old one stands beside it, whole.
            absent += 1
            if overwrite:
                (old,) = (path for path in folder.iterdir() if ".old-" in path.name)
                assert is_whole(old, "old")
        committed = target.exists() and is_whole(target, "new")
        status = run(target, overwrite)
        # The same command after a kill behind the last rename: the work was done already.
        assert status == (9 if committed and not overwrite else 0)
        assert is_whole(target, "new")
        assert list(folder.iterdir()) == [target], f"leftovers after a kill at step {step}"
    assert is_whole(target, "new")
    assert step > 15
    assert (1 <= absent <= 3) if overwrite else absent > 10


def test_a_restored_package_stays_when_the_run_is_not_repeated(tmp_path: Path) -> None:
    """Killed between the renames, then another command: the old package comes back first."""
    target = tmp_path / "out"
    build(target, "old")
    target.rename(tmp_path / ".out.old-0123456789ab")
    with pytest.raises(OutputExists):
        build(target)
    assert is_whole(target, "old")


def test_half_deleted_old_package_is_not_restored(tmp_path: Path) -> None:
    old = tmp_path / ".out.old-0123456789ab"
    old.mkdir()
    (old / "data").write_text("half")
    build(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_half_deleted_work_is_not_resumed(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out", SETTINGS) as staged:
        (staged.work / "journal").write_text("claims that everything is there")
        partial = staged.path.parent
    (partial / "settings.json").unlink()
    with StagedFolder(tmp_path / "out", SETTINGS) as staged:
        assert not staged.resumed and not list(staged.work.iterdir())
        assert json.loads((partial / "settings.json").read_text()) == SETTINGS
