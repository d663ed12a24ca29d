"""What each system gives of the RAM, with figures of such machines."""

from __future__ import annotations

import sys

import pytest

from conmoe_edge.memory.system_limits import commit_left, lockable, obtainable
from conmoe_edge.units import GIB


def test_windows_gives_no_more_than_its_commit_limit_has_left() -> None:
    # 32 GiB with a small page file: 20 GiB free, and 3 GiB of commit left after a browser and a virtual machine.
    assert obtainable("windows", 20 * GIB, 3 * GIB) == 3 * GIB
    assert obtainable("windows", 20 * GIB, 40 * GIB) == 20 * GIB
    assert obtainable("windows", 20 * GIB, None) == 20 * GIB


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_elsewhere_memory_is_given_and_counts_when_it_is_written_to(system: str) -> None:
    assert obtainable(system, 20 * GIB, 3 * GIB) == 20 * GIB


def test_page_locked_memory() -> None:
    assert lockable("windows", 32 * GIB, 24 * GIB) == 16 * GIB
    assert lockable("windows", 32 * GIB, 10 * GIB) == 10 * GIB
    assert lockable("linux", 32 * GIB, 24 * GIB) == 24 * GIB
    assert lockable("darwin", 32 * GIB, 24 * GIB) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there it is a figure")
def test_there_is_no_commit_limit_here() -> None:
    assert commit_left() is None


@pytest.mark.skipif(sys.platform != "win32", reason="only Windows has it")
def test_the_commit_limit_of_this_windows() -> None:
    assert (commit_left() or 0) > 100 << 20
