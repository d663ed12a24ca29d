"""Where each shell looks for completions, and the line that makes it look.

The scripts are click's own. bash needs the bash-completion package to look by itself, zsh a folder in its ``fpath``;
fish looks without being told. Raises ``ConmoeError`` where a file cannot be written, ``UsageError`` for an unknown
shell.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from click import Command
from click.shell_completion import get_completion_class

from conmoe_edge.checkpoint.fs.atomic_files import write_bytes
from conmoe_edge.errors import ConmoeError, UsageError

PROGRAM = "conmoe-edge"
SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_CONMOE_EDGE_COMPLETE"
_MARK = "# completion of conmoe-edge"


@dataclass(frozen=True, slots=True)
class Place:
    """Of one shell: the file that it reads, the user's rc file, and what that needs to say (``""``: nothing)."""

    shell: str
    file: Path
    rc: Path
    lines: str


def current_shell() -> str:
    """The user's login shell.

    Raises:
        UsageError: it is none of those that completion is made for.
    """
    name = Path(os.environ.get("SHELL", "")).name
    if name in SHELLS:
        return name
    raise UsageError(
        "The shell cannot be told." if not name else f"There is no completion for {name}.",
        "SHELL is not set" if not name else f"there is one for {', '.join(SHELLS)}",
        "completion install bash, zsh or fish",
    )


def place(shell: str) -> Place:
    """The folders are those of the shells' own documentation, with XDG's variables where they honour them."""
    home = Path.home()
    data = _folder("XDG_DATA_HOME", home / ".local" / "share")
    config = _folder("XDG_CONFIG_HOME", home / ".config")
    if shell == "bash":
        file = data / "bash-completion" / "completions" / PROGRAM
        return Place(
            shell, file, home / ".bashrc", f"[ -f {quote(str(file))} ] && . {quote(str(file))}"
        )
    if shell == "zsh":
        file = data / "zsh" / "site-functions" / f"_{PROGRAM}"
        rc = _folder("ZDOTDIR", home) / ".zshrc"
        lines = f"fpath=({quote(str(file.parent))} $fpath)\nautoload -Uz compinit && compinit"
        return Place(shell, file, rc, lines)
    return Place(shell, config / "fish" / "completions" / f"{PROGRAM}.fish", config, "")


def script(shell: str, command: Command) -> str:
    """The completion script, as click writes it."""
    found = get_completion_class(shell)
    assert found is not None, f"click knows {shell}"
    return found(command, {}, PROGRAM, _VARIABLE).source()


def install(where: Place, text: str) -> None:
    """Put the script where the shell looks for it."""
    _write(where.file, text)


def add_to_rc(where: Place) -> bool:
    """Append the lines to the rc file, once; whether that changed it."""
    try:
        before = where.rc.read_text("utf-8") if where.rc.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConmoeError(
            f"{where.rc} cannot be read.", str(error), f"add to it by hand: {where.lines}"
        ) from error
    if where.lines in before:
        return False
    gap = "" if not before or before.endswith("\n") else "\n"
    # A link stays a link: some keep such files elsewhere.
    target = where.rc.resolve()
    mode = target.stat().st_mode & 0o777 if target.is_file() else None
    _write(target, f"{before}{gap}\n{_MARK}\n{where.lines}\n")
    if mode is not None:
        target.chmod(mode)
    return True


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
    except (OSError, ConmoeError) as error:
        why = error.why if isinstance(error, ConmoeError) else error.strerror or str(error)
        raise ConmoeError(
            f"Cannot write {path}.", why, "conmoe-edge completion show SHELL prints the script"
        ) from error


def _folder(variable: str, default: Path) -> Path:
    said = os.environ.get(variable, "")
    return Path(said) if said and Path(said).is_absolute() else default
