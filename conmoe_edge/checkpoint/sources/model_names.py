"""What a model name means: an alias, an id on the hub, or a folder. Reads two small TOML files and
no network.

Raises ``ModelNotFound`` for a name that means nothing (with the nearest aliases), ``UsageError``
for a damaged user file.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from platformdirs import user_config_path

from conmoe_edge.checkpoint.gguf.files import SUFFIX, names_gguf
from conmoe_edge.errors import ModelNotFound, UsageError

Kind = Literal["alias", "hub", "path"]

_PACKAGE = Path(__file__).resolve().parents[2]
_SHIPPED = Path(__file__).with_name("aliases.toml")
_IN_PACKAGE = "package:"
_WELL_KNOWN = ("demo", "olmoe", "qwen3-30b", "deepseek-v2-lite", "mixtral", "gpt-oss-20b")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Meaning:
    """A name, resolved: exactly one of ``folder``, ``gguf`` and ``hub_id`` is set.

    ``gguf`` is a GGUF file, or a folder whose weights are in GGUF files.
    """

    name: str
    kind: Kind
    folder: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    gguf: Path | None = None

    @property
    def place(self) -> Path | None:
        """Where the model is on this disk; ``None`` for one on the hub."""
        return self.folder or self.gguf


def config_folder() -> Path:
    """The user's config folder; ``CONMOE_CONFIG_DIR`` redirects it."""
    redirected = os.environ.get("CONMOE_CONFIG_DIR")
    return Path(redirected) if redirected else user_config_path("conmoe-edge", appauthor=False)


def aliases() -> dict[str, str]:
    """All aliases, sorted by name; the user's own win over those that are shipped."""
    return dict(sorted((shipped_aliases() | own_aliases()).items()))


def shipped_aliases() -> dict[str, str]:
    """The aliases that come along, in their order."""
    return _read_aliases(_SHIPPED)


def own_aliases() -> dict[str, str]:
    """The user's own aliases; empty where there is no such file."""
    own = config_folder() / "aliases.toml"
    return _read_aliases(own) if own.is_file() else {}


def resolve(name: str, revision: str | None = None) -> Meaning:
    """What ``name`` means: a folder that exists, else an alias, else an id on the hub.

    A bare word counts as a folder only if that folder holds a ``config.json``, so that a stray
    folder called like an alias does not hide it.
    """
    place = _place(name)
    known = aliases()
    if place is not None and (name not in known or (place / "config.json").is_file()):
        return _here(name, "path", place, revision)
    if name.lower() in known:
        return _alias(name, known[name.lower()], revision)
    hub_id, _, inline = name.partition("@")
    if is_hub_id(hub_id) and not name.endswith(SUFFIX):
        return Meaning(name, "hub", hub_id=hub_id, revision=revision or inline or None)
    raise _unknown(name, known)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of an id on the hub: ``owner/name``."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def _place(name: str) -> Path | None:
    """A folder, or a GGUF file."""
    try:
        path = Path(name).expanduser()
        found = name and (path.is_dir() or names_gguf(path))
        return path.absolute() if found else None
    except (OSError, ValueError, RuntimeError):
        return None


def _here(name: str, kind: Kind, place: Path, revision: str | None) -> Meaning:
    _no_revision(name, revision, "folder" if place.is_dir() else "file")
    if names_gguf(place):
        return Meaning(name, kind, gguf=place)
    return Meaning(name, kind, folder=place)


def _alias(name: str, value: str, revision: str | None) -> Meaning:
    if value.startswith(_IN_PACKAGE):
        _no_revision(name, revision)
        return Meaning(name, "alias", folder=_PACKAGE / value.removeprefix(_IN_PACKAGE))
    place = _place(value)
    if place is not None:
        return _here(name, "alias", place, revision)
    hub_id, _, inline = value.partition("@")
    if not _HUB_ID.fullmatch(hub_id):
        raise ModelNotFound(
            f"The alias {name} leads to {value}.",
            "That is neither a folder that exists nor an id on the hub.",
            f"Correct it in {config_folder() / 'aliases.toml'}.",
        )
    return Meaning(name, "alias", hub_id=hub_id, revision=revision or inline or None)


def _no_revision(name: str, revision: str | None, kind: str = "folder") -> None:
    if revision is not None:
        raise UsageError(
            f"{name} is a {kind} on this machine.",
            f"A {kind} has no revisions.",
            "Leave --revision out.",
        )


def _read_aliases(path: Path) -> dict[str, str]:
    try:
        table = tomllib.loads(path.read_text("utf-8-sig")).get("aliases", {})
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read.", str(error).splitlines()[0], "Correct or remove the file."
        ) from None
    if not isinstance(table, dict) or not all(
        isinstance(value, str) and value for value in table.values()
    ):
        raise UsageError(
            f"{path} is not a list of aliases.",
            "",
            'It has a section [aliases] with lines such as: mine = "org/model"',
        )
    return {name.lower(): value for name, value in table.items()}


def _unknown(name: str, known: dict[str, str]) -> ModelNotFound:
    if name.endswith(SUFFIX):
        return ModelNotFound(f"There is no file {name}.", "", "Check the path.")
    if name.startswith((".", "~", "/", "\\")) or name.count("/") > 1 or "\\" in name:
        path = Path(name)
        if path.suffix in (".safetensors", ".json"):
            return ModelNotFound(
                f"{name} is not a folder.", "", f"Give the folder that holds it: {path.parent}"
            )
        return ModelNotFound(
            f"There is no folder {name}.",
            "",
            "Check the path, or use a name from the hub: org/model.",
        )
    word = name.lower()
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    near += [alias for alias in known if word and alias.startswith(word) and alias not in near][:3]
    return ModelNotFound(
        f"No model is called {name!r}.",
        "It is no folder, no alias, and no hub id of the form org/model."
        + ("" if near else f" Some of the {len(known)} aliases: {', '.join(_WELL_KNOWN)}."),
        f"Did you mean {' or '.join(near)}?"
        if near
        else "Use an alias, a folder, or a hub id such as Qwen/Qwen3-30B-A3B.",
    )
