"""Names and aliases of several packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.serve.model_names import aliases_of, names_of


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/one", "/a/two"], ["one", "two"]),
        (["/a/out", "/b/out"], ["a/out", "b/out"]),
        (["/x/a/out", "/y/a/out", "/z/other"], ["x/a/out", "y/a/out", "other"]),
        (["/out", "/a/out"], ["out", "a/out"]),
        (["/a/out", "/b/out", "/a", "/c/a/out"], ["a/out", "b/out", "a", "c/a/out"]),
    ],
)
def test_names_differ(folders: list[str], names: list[str]) -> None:
    assert names_of([Path(one) for one in folders]) == names


def test_a_folder_is_served_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="2 times"):
        names_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_aliases_say_of_which_package(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    names = names_of(folders)
    given = ["gpt-4o=a", f"small={tmp_path / 'b'}", "second=b"]
    assert aliases_of(names, folders, given) == [("gpt-4o",), ("small", "second")]
    for wrong in ("plain", "=a", "x=", "x=c", "b=a"):
        with pytest.raises(UsageError) as refused:
            aliases_of(names, folders, [wrong])
        assert "--alias" in refused.value.fix
    with pytest.raises(UsageError, match="taken"):
        aliases_of(names, folders, ["x=a", "x=b"])
