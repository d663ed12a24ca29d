"""The user's own aliases: ``aliases.toml`` in the config folder, one line a name, changed without touching the rest.

Comments and order of the file stay as they are. What cannot be changed line by line (an inline table, say) is left
alone and said. Raises ``UsageError``: a name or target that is none, or a file that cannot be read.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from conmoe_edge.checkpoint.fs.atomic_files import write_bytes
from conmoe_edge.checkpoint.sources.model_names import (
    aliases,
    config_folder,
    own_aliases,
    resolve,
    shipped_aliases,
)
from conmoe_edge.errors import UsageError
from conmoe_edge.units import parse_size

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SECTION = re.compile(r"\s*\[\s*aliases\s*\]\s*(#.*)?")
_ANY_SECTION = re.compile(r"\s*\[")
_HEAD = "# Your own names for models. They win over those that are shipped.\n\n[aliases]\n"


def alias_file() -> Path:
    """Where they lie; the file need not exist."""
    return config_folder() / "aliases.toml"


def add_alias(name: str, target: str) -> str:
    """Let ``name`` mean ``target``, a folder, a hub id (``org/name`` or ``org/name@revision``) or another alias.

    Returns:
        What was written: folders in full, other aliases followed.
    """
    wanted = name.strip().lower()
    if not _NAME.fullmatch(wanted) or parse_size(wanted) is not None or wanted == "auto":
        raise UsageError(
            f"{name!r} cannot be the name of a model.",
            "a name has small letters, digits, dots, dashes and underscores, and reads like no size",
            f"models alias my-model {target}",
        )
    value = _meaning(wanted, target)
    _write(wanted, value)
    return value


def remove_alias(name: str) -> str | None:
    """Forget the user's own ``name``.

    Returns:
        What the name means now, where one that is shipped was hidden by it.
    """
    wanted = name.strip().lower()
    own = own_aliases()
    if wanted not in own:
        shipped = wanted in shipped_aliases()
        mine = ", ".join(own)
        raise UsageError(
            f"You have no alias {name!r}.",
            "it is one that is shipped" if shipped else f"yours are: {mine}" if mine else "",
            f"models alias {wanted} TARGET gives it another meaning"
            if shipped
            else "conmoe-edge models shows all",
        )
    _write(wanted, None)
    return shipped_aliases().get(wanted)


def _meaning(name: str, target: str) -> str:
    meaning = resolve(target.strip())  # says what is wrong with it
    if meaning.kind == "alias":
        if target.strip().lower() == name:
            raise UsageError(f"{name} cannot lead to itself.", "", f"models alias {name} org/model")
        return aliases()[target.strip().lower()]
    if meaning.folder is not None:
        if not (meaning.folder / "config.json").is_file():
            raise UsageError(
                f"{meaning.folder} holds no model.",
                "it has no config.json",
                "give a model's folder",
            )
        return str(meaning.folder)
    if meaning.gguf is not None:
        return str(meaning.gguf)
    return f"{meaning.hub_id}@{meaning.revision}" if meaning.revision else str(meaning.hub_id)


def _write(name: str, value: str | None) -> None:
    path = alias_file()
    before = own_aliases()
    wanted = {key: one for key, one in before.items() if key != name}
    if value is not None:
        wanted[name] = value
    text = path.read_text("utf-8-sig") if path.is_file() else _HEAD
    changed = _edited(text, name, value)
    try:
        found = {k.lower(): v for k, v in tomllib.loads(changed).get("aliases", {}).items()}
    except (tomllib.TOMLDecodeError, AttributeError):
        found = {}
    if found != wanted:
        raise UsageError(
            f"{path} cannot be changed line by line.",
            'it writes its aliases in another form than one `name = "target"` a line',
            f"Change it by hand: {name} = {json.dumps(value or '', ensure_ascii=False)}",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, changed.encode(), f"Make {path} writable, or name the model by its folder.")


def _edited(text: str, name: str, value: str | None) -> str:
    """The text with the line of ``name`` replaced, added at the end of its section, or left out."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if _SECTION.fullmatch(line)), None)
    if start is None:
        lines += ["", "[aliases]"] if lines else ["[aliases]"]
        start = len(lines) - 1
    rest = (n for n in range(start + 1, len(lines)) if _ANY_SECTION.match(lines[n]))
    end = next(rest, len(lines))
    key = re.compile(rf"""\s*(["']?){re.escape(name)}\1\s*=""", re.IGNORECASE)
    line = (
        None if value is None else f"{_quoted_key(name)} = {json.dumps(value, ensure_ascii=False)}"
    )
    at = next((n for n in range(start + 1, end) if key.match(lines[n])), None)
    if at is not None:
        lines[at : at + 1] = [] if line is None else [line]
    elif line is not None:
        while end > start + 1 and not lines[end - 1].strip():
            end -= 1
        lines.insert(end, line)
    return "\n".join(lines) + "\n"


def _quoted_key(name: str) -> str:
    """A bare key may have no dot in it."""
    return json.dumps(name) if "." in name else name
