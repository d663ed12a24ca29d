"""The model hub, through ``huggingface_hub``: fetch a snapshot, or only its config and headers, or
what the cache has.

With ``offline`` nothing opens a socket. Weights are taken as safetensors only; pickles and code
are never fetched. Every failure becomes a ``ModelNotFound`` or ``CheckpointError`` with one
sentence on what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.fs.contained import is_plain_name
from conmoe_edge.checkpoint.gguf.files import PART, SUFFIX, first_part
from conmoe_edge.checkpoint.sources.hub_reach import connection_problem
from conmoe_edge.checkpoint.tensors.folder_check import TEMPLATES_FOLDER
from conmoe_edge.checkpoint.tensors.tensor_index import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    read_json_object,
)
from conmoe_edge.errors import CheckpointError, HubUnreachable, ModelNotFound

ALLOWED = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "README.md",
]


def _in_other_folders(folder: str) -> list[str]:
    """Patterns of all that lies in a folder other than ``folder``, or deeper: patterns have no word for "not"."""
    name = f"{folder}/"
    others = [f"{name[:at]}[!{letter}]*/*" for at, letter in enumerate(name)]
    return [*others, *(f"{name[:at]}/*" for at in range(1, len(folder))), f"{name}*/*"]


# Subfolders hold the same weights in the publisher's other formats; "consolidated" is Mistral's own
# second copy.
IGNORED = [
    *_in_other_folders(TEMPLATES_FOLDER),
    *(f"{TEMPLATES_FOLDER}/*.{kind}" for kind in ("json", "safetensors", "model", "txt")),
    *("consolidated*", "*.bin", "*.pt", "*.pth", "*.py"),
]


def is_offline(offline: bool) -> bool:
    """Whether the network is out of bounds, by the argument or by the hub's own environment
    variable.
    """
    return offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def fetch_snapshot(
    hub_id: str, revision: str | None, *, offline: bool, tqdm_class: Any = None
) -> Path:
    """The folder of a snapshot in the local cache, downloaded first where needed, allowed and possible.

    Raises:
        HubUnreachable: it is not in the cache, and there is no connection.
    """
    from huggingface_hub import snapshot_download

    if not offline and (why := connection_problem()):
        try:
            return fetch_snapshot(hub_id, revision, offline=True)
        except ModelNotFound as error:
            raise unreachable(hub_id, revision, why) from error
    with hub_errors(hub_id, revision, offline):
        folder = Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=ALLOWED,
                ignore_patterns=IGNORED,
                local_files_only=offline,
                tqdm_class=tqdm_class,
            )
        )
    if offline:
        _require_whole(folder, hub_id)
    return folder


def fetch_small_files(hub_id: str, revision: str | None) -> Path:
    """The snapshot folder with everything but the weights: config, tokenizer, licence."""
    from huggingface_hub import snapshot_download

    with hub_errors(hub_id, revision, offline=False):
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=[one for one in ALLOWED if one != "*.safetensors"],
                ignore_patterns=IGNORED,
            )
        )


def fetch_config(hub_id: str, revision: str | None) -> Path:
    """The snapshot folder with at least ``config.json`` in it."""
    from huggingface_hub import hf_hub_download

    with hub_errors(hub_id, revision, offline=False):
        return Path(hf_hub_download(hub_id, CONFIG_FILE, revision=revision)).parent


def fetch_headers(hub_id: str, revision: str | None) -> dict[str, tuple[str, Any]]:
    """Tensor name -> (file, ``huggingface_hub.TensorInfo``): a few ranged reads, no weights."""
    from huggingface_hub import errors, get_safetensors_metadata

    with hub_errors(hub_id, revision, offline=False):
        try:
            metadata = get_safetensors_metadata(hub_id, revision=revision)
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            # What the library's parser says to a header, or an index, of another form.
            raise errors.SafetensorsParsingError(type(error).__name__) from error
    return {
        name: (file, tensor)
        for file, part in sorted(metadata.files_metadata.items())
        for name, tensor in sorted(part.tensors.items())
    }


def is_whole(folder: Path) -> bool:
    """Whether a snapshot in the cache has its config and all of its weights (their content is not
    looked at).
    """
    if not (folder / CONFIG_FILE).is_file():
        return False
    if not (folder / INDEX_FILE).is_file():
        return (folder / SINGLE_FILE).is_file()
    shards = read_json_object(folder / INDEX_FILE).get("weight_map")
    return isinstance(shards, dict) and all(
        isinstance(name, str) and is_plain_name(name) and (folder / name).is_file()
        for name in shards.values()
    )


def _require_whole(folder: Path, hub_id: str) -> None:
    if not is_whole(folder):
        raise ModelNotFound(
            f"{hub_id} is only partly in the local cache.",
            "Its weights have not been downloaded, and offline was asked for.",
            "Run the command once without --offline (and without HF_HUB_OFFLINE=1).",
        )


_CONNECT = "Check the network connection; with the model in the cache already, add --offline."


@contextmanager
def hub_errors(
    hub_id: str, revision: str | None, offline: bool, connect: str = _CONNECT
) -> Iterator[None]:
    """The hub's many exceptions as ours. The order matters: several of them are subclasses of
    others. ``connect`` is what helps where the hub cannot be reached.
    """
    from huggingface_hub import errors

    named = f"{hub_id} (revision {revision})" if revision else hub_id
    if not offline and (why := connection_problem()):
        raise unreachable(hub_id, revision, why, connect)
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"{hub_id} asks its users to accept terms first.",
            "The hub did not give it out.",
            f"Accept them at https://huggingface.co/{hub_id}, then log in with: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{hub_id} has no revision {revision!r}.",
            "",
            "Leave --revision out, or name a branch, tag or commit of it.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"The hub has no model {hub_id}.",
            "It may be misspelt, or private.",
            "Check the name at https://huggingface.co/models, or log in with: hf auth login",
        ) from error
    except errors.NotASafetensorsRepoError as error:
        if (instead := _only_gguf(hub_id, revision)) is not None:
            raise instead from error
        raise CheckpointError(
            f"{named} has no weights in safetensors format.",
            "Pickled weights can run any program when they are opened, so they are not used here.",
            "Choose a revision or a copy of the model that has *.safetensors files.",
        ) from error
    except errors.SafetensorsParsingError as error:
        raise CheckpointError(
            f"The weights of {named} on the hub are damaged.",
            _reason(error),
            "Name another revision (--revision), or another copy of the model.",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(named, offline, connect, error) from error
    except errors.EntryNotFoundError as error:
        if (instead := _only_gguf(hub_id, revision)) is not None:
            raise instead from error
        raise CheckpointError(
            f"{named} lacks a file that a model must have.",
            _reason(error),
            "Name a repository or a revision (--revision) with config.json and *.safetensors files.",
        ) from error
    except (errors.HFValidationError, errors.HfHubHTTPError) as error:
        raise ModelNotFound(
            f"The hub refused {named}.", _reason(error), "Check the name, and try again later."
        ) from error
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        # HTTPError is the base class of whichever HTTP library the hub's client stands on; only
        # that client knows which one it is.
        raise _unreachable(named, offline, connect, error) from error


def require_config_on_hub(folder: Path, hub_id: str, revision: str | None) -> None:
    """Refuse a snapshot without a config where the repository has nothing but GGUF files.

    Raises:
        CheckpointError: says how to get one of them.
    """
    if not (folder / CONFIG_FILE).is_file() and (instead := _only_gguf(hub_id, revision)):
        raise instead


def _only_gguf(hub_id: str, revision: str | None) -> CheckpointError | None:
    """The error for a repository whose weights are in GGUF files alone; ``None`` where that is not known."""
    from huggingface_hub import HfApi, errors

    try:
        names = HfApi().list_repo_files(hub_id, revision=revision)
    except (errors.HfHubHTTPError, errors.HTTPError, OSError):  # pyright: ignore[reportPrivateImportUsage]
        return None
    found = [name for name in sorted(names) if name.endswith(SUFFIX) and "mmproj" not in name]
    if not found or any(name.endswith(".safetensors") for name in names):
        return None
    name = next((one for one in found if "q4_k_m" in one.lower()), found[0])
    first = first_part(name)
    part = PART.fullmatch(name)
    wanted = name if part is None else f"--include '{part['stem']}-*{SUFFIX}'"
    return CheckpointError(
        f"{hub_id} holds its weights in GGUF files only.",
        "GGUF files are read from this disk, not from the hub",
        f"hf download {hub_id} {wanted} --local-dir models, then name the file: models/{first}",
    )


def _unreachable(named: str, offline: bool, connect: str, error: Exception) -> ModelNotFound:
    if offline:
        return ModelNotFound(
            f"{named} is not in the local cache.",
            "Nothing is downloaded, because offline was asked for.",
            "Run the command once without --offline (and without HF_HUB_OFFLINE=1).",
        )
    return unreachable(named, None, _reason(_root(error)), connect)


def unreachable(
    hub_id: str, revision: str | None, why: str, connect: str = _CONNECT
) -> HubUnreachable:
    """The error for a hub that does not answer."""
    named = f"{hub_id} (revision {revision})" if revision else hub_id
    return HubUnreachable(f"{named} could not be fetched from the hub.", why, connect)


def _root(error: BaseException) -> BaseException:
    """What it all began with: the hub's own message about a dead network fills half a screen."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
