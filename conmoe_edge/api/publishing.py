"""``push`` and ``pull``: a package to the hub and from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conmoe_edge.checkpoint.sources.model_names import is_hub_id
from conmoe_edge.errors import UsageError

_SMALL = 4 << 20


@dataclass(frozen=True, slots=True)
class Pushed:
    """A package that was published, or would be.

    Attributes:
        hub_id: the repository.
        url, commit: where it is; ``None`` where nothing was sent.
        files: that travel, the card not among them.
        nbytes: of these.
        card: the model card.
        notes: sentences for whoever publishes.
    """

    hub_id: str
    url: str | None
    commit: str | None
    files: tuple[str, ...]
    nbytes: int
    card: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A package that was fetched: ``commit`` it is of, ``nbytes`` of all its ``files``."""

    folder: Path
    hub_id: str
    commit: str
    files: tuple[str, ...]
    nbytes: int


def push(
    package: str | Path,
    name: str,
    *,
    public: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Publish a package, with its receipt as the model card, in one commit.

    Args:
        package: folder that ``fit`` wrote; all of its checksums are compared first.
        name: ``owner/name`` on the hub; a new repository is private unless ``public``.
        revision: a branch; the hub's own choice without it.
        dry_run: say what would be published; opens no socket.

    Raises:
        PackageError: the folder is no whole package, or one that leaves the model as it was.
        HubRefused: nobody is logged in, or the hub does not take it.
        UsageError: ``name`` is none, or the repository is seen by others than ``public`` says.
    """
    from conmoe_edge.checkpoint.fs.contained import is_there, read_inside
    from conmoe_edge.checkpoint.package.manifest_io import load_manifest, verify_package
    from conmoe_edge.checkpoint.package.sidefiles import MODEL_CARD
    from conmoe_edge.checkpoint.sources.hub_packages import files_of
    from conmoe_edge.checkpoint.sources.hub_upload import require_login, upload_package
    from conmoe_edge.checkpoint.sources.origin import hub_origin
    from conmoe_edge.report.model_card import model_card, source_licence

    hub_id, folder = _hub_id(name), Path(package)
    files_of(load_manifest(folder), str(folder))
    if not dry_run:
        require_login()  # before everything is read
    manifest = verify_package(folder, deep=True)
    names = files_of(manifest, str(folder))
    licence = {}
    if is_there(folder, MODEL_CARD):
        text = read_inside(folder, MODEL_CARD, _SMALL).decode("utf-8", "replace")
        licence = source_licence(text)
    origin = hub_origin(manifest)
    card = model_card(manifest, hub_id, origin, licence)
    nbytes = sum((folder / one).stat().st_size for one in names)
    notes = ()
    if origin is None and "/" in str(manifest.source.get("name")):
        notes = (f"The manifest, which is published, names the source: {manifest.source['name']}.",)
    url = commit = None
    if not dry_run:
        message = f"Package of conmoe-edge {manifest.tool_version}".rstrip()
        done = upload_package(
            folder, names, card, hub_id, public=public, revision=revision, message=message
        )
        url, commit = done.url, done.commit
    return Pushed(hub_id, url, commit, names, nbytes, card, notes)


def pull(
    name: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    on_file: Callable[[str, int, int], None] | None = None,
) -> Pulled:
    """Fetch a package from the hub; its folder is there whole, with every checksum right, or not at all.

    Args:
        name: ``owner/name`` on the hub.
        out: the folder; the last part of ``name`` without it.
        revision: branch, tag or commit.
        overwrite: replace a package that is there.
        fresh: throw away what an earlier fetch left.
        on_file: told a file's name, its number and how many there are, before it is fetched.

    Raises:
        ModelNotFound: the hub has none of that name, or cannot be reached.
        PackageError: it is no package, or damaged.
        OutputExists, InUse, ResumeMismatch, NoSpace, UsageError: as their names say.
    """
    from conmoe_edge.checkpoint.package.staged import StagedFolder
    from conmoe_edge.checkpoint.sources.hub import is_offline
    from conmoe_edge.checkpoint.sources.hub_packages import fetch_package, files_of, find_commit

    hub_id = _hub_id(name)
    if is_offline(False):
        raise UsageError(
            f"{hub_id} cannot be fetched offline.",
            "HF_HUB_OFFLINE is set.",
            "Unset HF_HUB_OFFLINE.",
        )
    commit = find_commit(hub_id, revision)
    target = Path(hub_id.partition("/")[2]) if out is None else Path(out)
    settings = {"pull": hub_id, "commit": commit}
    with StagedFolder(target, settings, overwrite=overwrite, fresh=fresh) as staged:
        tell = on_file or (lambda name, number, of: None)
        manifest = fetch_package(hub_id, commit, staged.path, tell)
        names = files_of(manifest, hub_id)
        nbytes = sum((staged.path / one).stat().st_size for one in names)
        staged.commit()
        return Pulled(staged.target, hub_id, commit, names, nbytes)


def _hub_id(name: str) -> str:
    """``owner/name``, and nothing else that a model may be called."""
    if not is_hub_id(name):
        raise UsageError(
            f"{name!r} is no name on the hub.", "It has the form owner/name.", "org/my-model"
        )
    return name
