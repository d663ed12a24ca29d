"""Whether a folder may be given to a library that opens files in it by itself, as transformers does.

``from_pretrained(folder)`` looks for config, generation config, tokenizer files of any of a hundred names, chat
templates and weights, and follows what these files name. So the whole folder is gone over first, by every function
here that hands a folder on. Refused, by name, are

- links that leave the folder, links that lead nowhere, pipes and devices, whatever they are called, and the same among
  ``additional_chat_templates``: a link that were skipped would be a tokenizer or a template that is silently another
- an adapter (``adapter_config.json``), which names a model to be loaded in the place of the folder's own
- a ``config.json`` that sends the reader on to another config or to weights of another name
- a tokenizer whose settings name a file outside the folder

Peak memory: the small files that are read, one at a time. Raises ``CheckpointError`` and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.fs.contained import check_entries, is_plain_name, is_there
from conmoe_edge.checkpoint.tensors.tensor_index import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    read_json_object,
)
from conmoe_edge.errors import CheckpointError

ADAPTER_FILE = "adapter_config.json"
TEMPLATES_FOLDER = "additional_chat_templates"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Both become arguments of the tokenizer's class."""

_OTHER_CONFIG, _OTHER_WEIGHTS = "configuration_files", "transformers_weights"
_VERSIONED = "fast_tokenizer_files"
_FILES = ("vocab", "merges")
_FILES_END = ("_file", "_files", "_spm")
_AGAIN = "Do not use this copy of the model: get it from its publisher."


def check_folder(folder: Path) -> None:
    """Refuse a model's or a package's folder in which, or by way of which, a file outside it would be opened.

    Raises:
        CheckpointError: what is refused, see above; the folder or one of its settings cannot be read.
    """
    check_entries(folder)
    _check_templates(folder)
    if is_there(folder, ADAPTER_FILE):
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_FILE}).",
            "It would be put on top of the model, or another model would be loaded by its name.",
            "Merge the adapter into the model (merge_and_unload of peft, then save_pretrained), or remove the file.",
        )
    if is_there(folder, CONFIG_FILE):
        _check_config(folder)
    for name in TOKENIZER_SETTINGS:
        if is_there(folder, name):
            _check_tokenizer(folder, name)


def _check_templates(folder: Path) -> None:
    templates = folder / TEMPLATES_FOLDER
    if templates.is_symlink():
        raise CheckpointError(
            f"{templates} is a link.",
            "Its templates lie elsewhere.",
            "Put the folder itself there.",
        )
    if templates.is_dir():
        check_entries(templates)


def _check_config(folder: Path) -> None:
    config = read_json_object(folder / CONFIG_FILE)
    for part in (config, *(inner for inner in config.values() if isinstance(inner, dict))):
        for key, same in ((_OTHER_CONFIG, None), (_OTHER_WEIGHTS, _weights_name(folder))):
            if part.get(key) not in (None, same):
                raise CheckpointError(
                    f"{folder / CONFIG_FILE} names other files ({key}).",
                    "What is read must be what was checked.",
                    f"Where it means the files that are there anyway: remove {key} from it.",
                )


def _weights_name(folder: Path) -> str:
    """What ``CheckpointIndex.open`` begins with."""
    return INDEX_FILE if is_there(folder, INDEX_FILE) else SINGLE_FILE


def _check_tokenizer(folder: Path, name: str) -> None:
    for key, value in read_json_object(folder / name).items():
        if key == _VERSIONED or key in _FILES or key.endswith(_FILES_END):
            for named in _strings(value):
                if _leads_out(folder, named, key == _VERSIONED):
                    raise CheckpointError(
                        f"{folder / name} names a file outside the folder.",
                        f"{key}: {named[:100]!r}",
                        _AGAIN,
                    )


def _leads_out(folder: Path, named: str, looked_up: bool) -> bool:
    """Whether a tokenizer would find a file outside ``folder`` under ``named``.

    Where it is ``looked_up``, it is joined to the folder. Elsewhere it is taken as it stands: old tokenizers remember
    where they were saved from, and a place that does not exist here harms nobody.
    """
    if looked_up:
        return not is_plain_name(named)
    return os.path.lexists(named) and not (is_plain_name(named) and Path.cwd() == folder.resolve())


def _strings(value: Any) -> Iterator[str]:
    """The value, or what a list holds; a vocabulary that stands there itself is a table and names nothing."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (one for one in value if isinstance(one, str))
