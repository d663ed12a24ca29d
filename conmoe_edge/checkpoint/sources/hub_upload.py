"""A package to the model hub, through ``huggingface_hub``: one commit, or nothing that anybody sees.

A repository that holds something else is left alone, and so is who may see one that is there already.

Peak memory: what the library needs. Raises ``HubRefused``, ``UsageError``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME
from conmoe_edge.checkpoint.fs.contained import path_inside
from conmoe_edge.checkpoint.sources.hub import is_offline
from conmoe_edge.checkpoint.sources.hub_reach import connection_problem
from conmoe_edge.errors import HubRefused, UsageError

CARD = "README.md"
_LOGIN = "Log in with a token that may write: hf auth login"
_OF_A_NEW_REPOSITORY = frozenset({".gitattributes", CARD})


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Where a package is now: the page of the repository, and the commit."""

    url: str
    commit: str


def require_login() -> None:
    """Refuse where no token is known.

    Raises:
        HubRefused: with the command that logs in.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubRefused("Nobody is logged in to the hub here.", "", _LOGIN)


def upload_package(
    folder: Path,
    names: Sequence[str],
    card: str,
    hub_id: str,
    *,
    public: bool,
    revision: str | None,
    message: str,
) -> Uploaded:
    """Write ``names`` of ``folder`` and the model card ``card`` to ``hub_id`` in one commit.

    The repository and the branch ``revision`` are made where they are missing. Weights that an earlier package left
    there go with the same commit.

    Raises:
        HubRefused: nobody is logged in or may write there, the repository holds something else, no connection.
        UsageError: the repository is there and is seen by others than ``public`` says.
        CheckpointError: a file is not a plain one inside ``folder``.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    require_login()
    api = HfApi()
    additions = [CommitOperationAdd(name, str(path_inside(folder, name))) for name in names]
    additions.append(CommitOperationAdd(CARD, card.encode()))
    with _hub_errors(hub_id):
        try:
            info = api.model_info(hub_id)
        except errors.RepositoryNotFoundError:
            info = None
    if info is not None:
        _check_repository(hub_id, bool(info.private), public, _names(info.siblings))
    with _hub_errors(hub_id):
        if info is None:
            api.create_repo(hub_id, private=not public)
        if revision is not None:
            api.create_branch(hub_id, branch=revision, exist_ok=True)
        there = _names(api.model_info(hub_id, revision=revision).siblings)
        stale = sorted(one for one in there - set(names) if one.endswith(".safetensors"))
        commit = api.create_commit(
            hub_id,
            [*additions, *(CommitOperationDelete(one, is_folder=False) for one in stale)],
            commit_message=message,
            revision=revision,
        )
    return Uploaded(f"{api.endpoint}/{hub_id}", str(commit.oid))


def _names(siblings: Sequence[object] | None) -> set[str]:
    return {str(getattr(one, "rfilename", "")) for one in siblings or ()}


def _check_repository(hub_id: str, private: bool, public: bool, there: set[str]) -> None:
    if there - _OF_A_NEW_REPOSITORY and MANIFEST_NAME not in there:
        raise HubRefused(
            f"{hub_id} is there, and is no package of conmoe-edge.",
            f"It has files of its own, such as {min(there - _OF_A_NEW_REPOSITORY)}.",
            "Choose another name.",
        )
    if private == public:
        raise UsageError(
            f"{hub_id} is there, and {'only its owner sees' if private else 'everybody sees'} it.",
            "Who may see a repository is changed in its settings on the hub only.",
            "Leave --public out." if private else "Add --public, or choose another name.",
        )


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """What the library says while it writes, as ours."""
    from huggingface_hub import errors

    if not is_offline(False) and (why := connection_problem()):
        raise HubRefused(
            f"{hub_id} cannot be published.", why, "Check the network connection, and try again."
        )
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise HubRefused(
            f"{hub_id} cannot be published offline.", "HF_HUB_OFFLINE is set.", "Unset it."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = _LOGIN if status in (401, 403, 404) else "Run the same command again later."
        raise HubRefused(f"The hub did not take {hub_id}.", _reason(error), fix) from error
    except (ValueError, RuntimeError, OSError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        # Of an upload that failed on the way the library makes a RuntimeError, of an answer that it does not
        # understand a ValueError.
        raise HubRefused(
            f"{hub_id} could not be published.",
            _reason(error.__cause__ or error),
            "Run the same command again: what has arrived is not sent twice.",
        ) from error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
