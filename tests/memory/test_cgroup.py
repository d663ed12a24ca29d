"""Control groups, on small copies of the files that Linux shows."""

from __future__ import annotations

import pytest

from conmoe_edge.memory.cgroup import cgroup_memory
from conmoe_edge.units import GIB

_UNLIMITED_V1 = "9223372036854771712\n"


class Tree:
    """A file system root with /proc/self and /sys/fs/cgroup."""

    def __init__(self, root):
        self.root = root

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def v2(self, own: str, seen_root: str = "/", mount: str = "/sys/fs/cgroup") -> None:
        self.write("proc/self/cgroup", f"0::{own}")
        self.write(
            "proc/self/mountinfo",
            "21 1 0:20 / / rw - ext4 /dev/sda rw\n"
            f"30 21 0:26 {seen_root} {mount} rw,nosuid - cgroup2 cgroup2 rw",
        )

    def v1(self, own: str, seen_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"5:cpu:/x\n4:memory,hugetlb:{own}\n0::/")
        self.write(
            "proc/self/mountinfo",
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
            "34 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            f"35 31 0:32 {seen_root} /sys/fs/cgroup/memory rw shared:9"
            " - cgroup cgroup rw,memory,hugetlb",
        )


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_v2_limit_less_what_is_used(tree):
    tree.v2("/user/app")
    tree.write("sys/fs/cgroup/user/app/memory.max", 4 * GIB)
    tree.write("sys/fs/cgroup/user/app/memory.current", 3 * GIB)
    tree.write(
        "sys/fs/cgroup/user/app/memory.stat",
        f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}",
    )
    found = cgroup_memory(tree.root)
    assert found is not None
    assert found.limit == 4 * GIB
    assert found.available == 2.5 * GIB  # the page cache gives way


def test_v2_max_is_no_limit(tree):
    tree.v2("/app")
    tree.write("sys/fs/cgroup/app/memory.max", "max")
    assert cgroup_memory(tree.root) is None


def test_v2_a_parent_binds(tree):
    tree.v2("/slice/unit/child")
    tree.write("sys/fs/cgroup/slice/unit/child/memory.max", "max")
    tree.write("sys/fs/cgroup/slice/unit/memory.max", 8 * GIB)
    tree.write("sys/fs/cgroup/slice/unit/memory.current", GIB)
    tree.write("sys/fs/cgroup/slice/memory.max", 6 * GIB)
    tree.write("sys/fs/cgroup/slice/memory.current", 5 * GIB)
    found = cgroup_memory(tree.root)
    assert found is not None
    assert (found.limit, found.available) == (6 * GIB, GIB)


def test_v1_limit_and_page_cache_of_the_subtree(tree):
    tree.v1("/docker/abc")
    folder = "sys/fs/cgroup/memory/docker/abc"
    tree.write(f"{folder}/memory.limit_in_bytes", 2 * GIB)
    tree.write(f"{folder}/memory.usage_in_bytes", GIB)
    tree.write(f"{folder}/memory.stat", f"inactive_file 5\ntotal_inactive_file {GIB // 2}")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", _UNLIMITED_V1)
    found = cgroup_memory(tree.root)
    assert found is not None
    assert (found.limit, found.available) == (2 * GIB, 1.5 * GIB)


def test_v1_without_a_limit(tree):
    tree.v1("/")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", _UNLIMITED_V1)
    assert cgroup_memory(tree.root) is None


def test_inside_a_container_the_mount_shows_a_part_of_the_tree(tree):
    tree.v1("/docker/abc", seen_root="/docker/abc")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", GIB)
    tree.write("sys/fs/cgroup/memory/memory.usage_in_bytes", 0)
    found = cgroup_memory(tree.root)
    assert found is not None and found.limit == GIB


def test_a_path_that_is_not_mounted_falls_back_to_the_mount_point(tree):
    tree.v2("/host/only/path")
    tree.write("sys/fs/cgroup/memory.max", GIB)
    found = cgroup_memory(tree.root)
    assert found is not None and found.limit == GIB


def test_a_path_out_of_the_tree_is_not_followed(tree):
    tree.v2("/../../outside")
    tree.write("sys/outside/memory.max", 1)
    tree.write("sys/fs/cgroup/memory.max", GIB)
    found = cgroup_memory(tree.root)
    assert found is not None and found.limit == GIB


def test_more_used_than_allowed_leaves_nothing(tree):
    tree.v2("/a")
    tree.write("sys/fs/cgroup/a/memory.max", GIB)
    tree.write("sys/fs/cgroup/a/memory.current", 2 * GIB)
    found = cgroup_memory(tree.root)
    assert found is not None and found.available == 0


def test_blanks_in_the_mount_point(tree):
    tree.v2("/a", mount="/odd\\040place")
    tree.write("odd place/a/memory.max", GIB)
    found = cgroup_memory(tree.root)
    assert found is not None and found.limit == GIB


@pytest.mark.parametrize("text", ["", "garbage", "0::", "1:memory", "::\n:"])
def test_damaged_files_are_no_limit(tree, text):
    tree.write("proc/self/cgroup", text)
    tree.write("proc/self/mountinfo", text)
    assert cgroup_memory(tree.root) is None


def test_no_proc_at_all(tmp_path):
    assert cgroup_memory(tmp_path) is None
