"""Names of several packages for clients: those of their folders, made different, and aliases. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from conmoe_edge.errors import UsageError


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as many of those above it as make it another one than the others'
    (``a/out``).

    Raises:
        UsageError: a folder is there twice.
    """
    whole = [folder.resolve() for folder in folders]
    for folder, count in Counter(whole).items():
        if count > 1:
            raise UsageError(
                f"{folders[whole.index(folder)]} is there {count} times.",
                "one package has one place in a server",
                "name it once; --alias NAME=FOLDER gives it more names",
            )
    parts = [[part for part in folder.parts if part != folder.anchor] for folder in whole]
    lengths = [1] * len(whole)
    while True:
        names = [
            "/".join(one[-length:]) or "model" for one, length in zip(parts, lengths, strict=True)
        ]
        again = {name for name, count in Counter(names).items() if count > 1}
        longer = [
            min(length + (name in again), max(1, len(one)))
            for one, length, name in zip(parts, lengths, names, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def aliases_of(
    names: Sequence[str], folders: Sequence[Path], given: Sequence[str]
) -> list[tuple[str, ...]]:
    """The aliases of each package, of words ``NAME=FOLDER``; FOLDER is a package's name or its folder.

    Raises:
        UsageError: a word has another form, names no package, or a name that is taken.
    """
    found: list[list[str]] = [[] for _ in names]
    whole = [folder.resolve() for folder in folders]
    taken = set(names)
    for word in given:
        alias, mark, target = word.partition("=")
        if not (alias and mark and target):
            raise UsageError(
                f"--alias {word} does not say of which package.",
                f"there are {len(names)}",
                f"--alias {alias or 'NAME'}={names[0]}",
            )
        if target in names:
            index = names.index(target)
        elif Path(target).resolve() in whole:
            index = whole.index(Path(target).resolve())
        else:
            raise UsageError(
                f"--alias {word} names no package that is served.",
                f"there are {', '.join(names)}",
                f"--alias {alias}={names[0]}",
            )
        if alias in taken:
            raise UsageError(
                f"--alias {word} gives a name that is taken.", "", f"--alias {alias}-2={target}"
            )
        taken.add(alias)
        found[index].append(alias)
    return [tuple(one) for one in found]
