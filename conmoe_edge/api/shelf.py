"""What ``run`` keeps in the user's data folder: packages by name; and what of it, and of the hub's cache, is removed.

``CONMOE_DATA_DIR`` redirects the folder. Only folders that ``fit`` wrote there are ever removed, and models in the
hub's own cache, through the hub's own library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_data_path

from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME
from conmoe_edge.checkpoint.fs.contained import is_plain_name
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.checkpoint.sources.hub_cache import cached_models, remove_cached
from conmoe_edge.checkpoint.sources.model_names import resolve
from conmoe_edge.errors import CheckpointError, ConmoeError, ModelNotFound, UsageError
from conmoe_edge.plan.request import PlanRequest

DATA_DIR_VARIABLE = "CONMOE_DATA_DIR"
_ODD = re.compile(r"[^A-Za-z0-9._-]+")
_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that takes room.

    Attributes:
        name: what ``rm`` and, of a package, ``run`` call it.
        kind: ``package`` that ``run`` made, ``unfinished`` fit of one, or ``source``, a model in the hub's cache.
        place: its folder.
        nbytes: on the disk; links count nothing.
        note: of a package the model and the budget that it was made for; else empty.
    """

    name: str
    kind: str
    place: Path
    nbytes: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; sizes in bytes."""
        return {
            "name": self.name,
            "kind": self.kind,
            "place": str(self.place),
            "bytes": self.nbytes,
            "note": self.note,
        }


def packages_folder() -> Path:
    """Where ``run`` puts packages."""
    redirected = os.environ.get(DATA_DIR_VARIABLE)
    base = Path(redirected) if redirected else user_data_path("conmoe-edge", appauthor=False)
    return base / "packages"


def package_place(model: str, request: PlanRequest) -> Path:
    """Where the package of ``model`` for ``request`` is kept: the same for the same question.

    Raises:
        ModelNotFound: ``model`` means nothing.
    """
    meaning = resolve(model)
    place = meaning.place
    shown = meaning.hub_id or model
    name = _ODD.sub("-", model if place is None or meaning.kind == "alias" else place.name)
    said = {"request": request.to_json(), "model": shown if place is None else str(place)}
    if request == PlanRequest() and (place is None or meaning.kind == "alias"):
        return packages_folder() / _folder_name(name)
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:_DIGITS]
    return packages_folder() / _folder_name(f"{name.strip('-.')}-{digest}")


def _folder_name(name: str) -> str:
    """``name`` as a folder may be called on every system: Windows takes ``con`` and ``aux.7b`` for devices."""
    plain = name.strip("-.").lower()
    return plain if is_plain_name(plain) else f"model-{plain}"


def kept() -> tuple[Kept, ...]:
    """Packages that ``run`` made, fits that were not finished, and the models in the hub's cache.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    sources = (
        Kept(model.hub_id, "source", model.place, model.nbytes)
        for model in cached_models().values()
    )
    return (*packages(), *sources)


def remove(one: Kept) -> None:
    """Remove what ``find_kept`` gave.

    Raises:
        ConmoeError: it cannot be removed.
    """
    if one.kind == "source":
        remove_cached(one.name)
        return
    try:
        shutil.rmtree(one.place)
    except OSError as error:
        raise ConmoeError(
            f"{one.place} cannot be removed.", error.strerror or str(error), "remove it yourself"
        ) from error


def find_kept(name: str) -> tuple[Kept, ...]:
    """What is called ``name``: of packages that, and of the same name what is unfinished.

    Raises:
        ModelNotFound: nothing of that name is kept.
        UsageError: it is a folder of the user's own.
    """
    everything = kept()
    found = tuple(one for one in everything if one.name == name)
    if found:
        return found
    if Path(name).exists():
        raise UsageError(
            f"{name} is a folder or file of yours.",
            f"rm removes what run made in {packages_folder()}, and models in the hub's cache",
            "remove it yourself",
        )
    try:
        hub_id = resolve(name).hub_id
    except ConmoeError:
        hub_id = None
    found = tuple(one for one in everything if one.kind == "source" and one.name == hub_id)
    if found:
        return found
    raise ModelNotFound(
        f"Nothing that is called {name} is kept here.", "", "conmoe-edge list shows what is"
    )


def packages() -> Iterator[Kept]:
    """Of ``kept`` what ``run`` made, finished and unfinished; the hub's cache is not looked at."""
    folder = packages_folder()
    try:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read.", error.strerror or str(error), "check its permissions"
        ) from error
    for place in inside:
        if place.is_symlink() or not place.is_dir():
            continue
        name, dot, _ = place.name.removeprefix(".").partition(".partial-")
        if place.name.startswith("."):
            if dot:
                yield Kept(name, "unfinished", place, _nbytes(place))
        elif (place / MANIFEST_NAME).is_file():
            yield Kept(place.name, "package", place, _nbytes(place), _note(place))


def _note(place: Path) -> str:
    try:
        manifest = load_manifest(place)
    except ConmoeError as error:
        return error.what
    budget = manifest.plan.get("budget", {})
    asked = budget.get("asked", "") if isinstance(budget, dict) else ""
    return f"{manifest.source.get('name', '?')} for {asked}".removesuffix(" for ")


def _nbytes(place: Path) -> int:
    total = 0
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink():
            facts = path.stat()
            total += facts.st_size if facts.st_nlink == 1 else 0  # a link to a model elsewhere
    return total
