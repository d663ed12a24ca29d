"""The user's alias file: changed by the line, or not at all."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conmoe_edge.checkpoint.sources.locate import aliases
from conmoe_edge.checkpoint.sources.user_aliases import _edited, add_alias, alias_file, remove_alias
from conmoe_edge.errors import ModelNotFound, UsageError


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONMOE_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def written(text: str) -> Path:
    alias_file().parent.mkdir(exist_ok=True)
    alias_file().write_text(text, encoding="utf-8")
    return alias_file()


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_first_alias_makes_the_file(tmp_path: Path) -> None:
    assert add_alias("Mine", "org/model@v2") == "org/model@v2"
    assert aliases()["mine"] == "org/model@v2"
    folder = model(tmp_path / 'a "folder"')
    assert add_alias("other.one", str(folder)) == str(folder)
    assert aliases()["other.one"] == str(folder)
    assert alias_file().read_text().startswith("# Your own names")


def test_a_mark_of_an_editor_in_front_is_no_part_of_the_file() -> None:
    add_alias("mine", "org/model")
    text = alias_file().read_text("utf-8")
    alias_file().write_text(text, "utf-8-sig")
    assert aliases()["mine"] == "org/model"
    add_alias("other", "org/other")
    assert (aliases()["mine"], aliases()["other"]) == ("org/model", "org/other")


def test_an_alias_of_an_alias_is_followed_now() -> None:
    assert add_alias("mine", "OLMOE") == aliases()["olmoe"] == "allenai/OLMoE-1B-7B-0924"
    add_alias("olmoe", "org/other")
    assert aliases()["mine"] == "allenai/OLMoE-1B-7B-0924"
    assert add_alias("third", "olmoe") == "org/other"
    assert remove_alias("olmoe") == "allenai/OLMoE-1B-7B-0924"
    assert remove_alias("third") is None


def test_the_rest_of_the_file_stays_as_it_is() -> None:
    text = (
        "# mine\n[other]\nmine = 3\n\n[aliases] # names\n# good\na = 'org/a'\n"
        '"B.1" = "org/b"  # dots\n\n[last]\nx = [\n "a = 1",\n]\n'
    )
    path = written(text)
    add_alias("new", "org/new")
    assert path.read_text() == text.replace("# dots\n", '# dots\nnew = "org/new"\n')
    add_alias("b.1", "org/c")
    assert 'new = "org/new"' in path.read_text() and '"b.1" = "org/c"' in path.read_text()
    assert "org/b" not in path.read_text()
    remove_alias("new")
    remove_alias("b.1")
    assert path.read_text() == text.replace('"B.1" = "org/b"  # dots\n', "")


@pytest.mark.parametrize(
    "text",
    [
        'aliases = {a = "org/a"}\n',
        'aliases.a = "org/a"\n',
        '[aliases]\na = """\nmine = 3\n"""\n',
    ],
)
def test_what_cannot_be_changed_by_the_line_is_left_alone(text: str) -> None:
    path = written(text)
    if "'''" in text or '"""' in text:
        add_alias("new", "org/new")  # after the text of several lines
        return
    with pytest.raises(UsageError, match="line by line") as caught:
        add_alias("new", "org/new")
    assert 'new = "org/new"' in caught.value.fix
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "target", "error"),
    [
        ("a b", "org/m", UsageError),
        ("", "org/m", UsageError),
        ("8gb", "org/m", UsageError),
        ("auto", "org/m", UsageError),
        ("mine", "nothing", ModelNotFound),
        ("mine", "./absent", ModelNotFound),
        ("olmoe", "olmoe", UsageError),
        ("mine", ".", UsageError),
    ],
)
def test_nonsense_is_refused_and_nothing_written(
    name: str, target: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        add_alias(name, target)
    assert not alias_file().exists()


def test_only_ones_own_can_be_forgotten() -> None:
    with pytest.raises(UsageError, match="no alias 'olmoe'") as caught:
        remove_alias("olmoe")
    assert "shipped" in caught.value.why
    with pytest.raises(UsageError, match="no alias 'nothing'"):
        remove_alias("nothing")


NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,6}", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NAMES, st.one_of(st.none(), st.text(max_size=8)))))
def test_any_sequence_of_changes_is_what_a_dictionary_would_hold(
    changes: list[tuple[str, str | None]],
) -> None:
    text, held = "[aliases]\n", {}
    for name, value in changes:
        if value is not None:
            # What JSON writes as a pair of halves is no TOML; a target with such characters is no folder.
            value = "".join(c for c in value if c.isprintable() and ord(c) < 0xD800)
        text = _edited(text, name, value)
        held.pop(name, None)
        if value is not None:
            held[name] = value
        assert tomllib.loads(text)["aliases"] == held
