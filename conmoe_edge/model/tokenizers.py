"""A model's tokenizer: the one place that opens it, with one set of refusals.

transformers does not read the model's folder. It reads a private copy of the tokenizer's own files, from which every
name was dropped that could choose code or another file, with a config that has no sizes of the model's. Then the
tokenizer has to encode and decode a line, and no token of it may be one that the model has no embedding for.

Peak memory: the tokenizer's files, and what the tokenizer makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from conmoe_edge.checkpoint.fs.contained import is_there, read_inside
from conmoe_edge.checkpoint.tensors.folder_check import TEMPLATES_FOLDER, check_folder
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE
from conmoe_edge.errors import CalibrationError, CheckpointError
from conmoe_edge.model.config_json import believed, read_object, read_settings
from conmoe_edge.model.foreign import foreign
from conmoe_edge.model.tokenizer_files import has_tokenizer
from conmoe_edge.model.vocabulary_files import VocabularyFile, vocabulary_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from conmoe_edge.checkpoint.gguf.opened import GgufModel

SETTINGS = "tokenizer_config.json"
_JSON = (
    "tokenizer.json",
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tekken.json",
)
_OTHERS = ("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja")
_MOST_BYTES = 128 << 20
_MOST_TEMPLATES = 64

_OTHER_FILES = frozenset(
    {
        "vocab_file",
        "merges_file",
        "tokenizer_file",
        "spm_file",
        "fast_tokenizer_files",
        "added_tokens_file",
        "special_tokens_map_file",
        "vocab",
        "merges",
        "tokenizer_object",
        "tokenizer_type",
        "init_inputs",
        "from_slow",
        "use_fast",
        "is_local",
        "local_files_only",
        "cache_dir",
        "subfolder",
        "revision",
        "proxies",
        "processor_class",
        "backend",
        "files_loaded",
    }
)
"""Arguments of a tokenizer's constructor that a file may not choose."""

_LINE = "".join(map(chr, range(32, 127))) + "\n\téß中文\u200d🙂𐍈 a"
_SIDES = ("left", "right")
_PROGRAM_ALONE = frozenset({"deepseek_v3"})
"""Kinds whose tiktoken files (Moonlight) have their rules in a program; transformers 5.21 took its own for them."""
_ONE_FILE = (
    "put a tokenizer.json with the model's tokens into the folder; copies of a model for other "
    "programs often have one"
)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``, without the network and without code of the model's.

    Raises:
        CalibrationError: there is none that can be used, or it does not belong to the model.
    """
    try:
        check_folder(folder)
        if not has_tokenizer(folder):
            raise _unusable(folder, "it has no file with a vocabulary")
        config, vocabulary = _config_of(folder)
        file = vocabulary_file(folder)
        with TemporaryDirectory(prefix="conmoe-tokenizer-") as private:
            _copy(folder, Path(private))
            try:
                tokenizer = _open(folder, Path(private), config, file)
            except CalibrationError as error:  # libraries name the copy
                why = error.why.replace(private, str(folder))
                raise CalibrationError(error.what, why, error.fix) from error
    except CheckpointError as error:
        raise _unusable(
            folder, ": ".join(filter(None, (error.what.rstrip("."), error.why)))
        ) from error
    tokenizer.name_or_path = str(folder)
    with foreign(partial(_unusable, folder)):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:  # a file could cut every prompt, or fill it up to any length
            backend.no_truncation()
            backend.no_padding()
        for special in (False, True):
            tokens = list(tokenizer(_LINE, add_special_tokens=special, verbose=False)["input_ids"])
            tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        known = {*tokenizer.get_vocab().values(), *tokens, *tokenizer.all_special_ids}
        silent = not tokenizer(_LINE, add_special_tokens=False, verbose=False)["input_ids"]
        least, most = min(known, default=0), max(known, default=-1)
        other = not silent and file is not None and not file.agrees(tokenizer)
    if silent:  # made out of nothing, beside a vocabulary of another kind of tokenizer
        raise _unusable(folder, "every text is no tokens to what transformers makes of its files")
    if other:
        assert file is not None
        raise CalibrationError(
            f"{folder} has no tokenizer that can be used.",
            f"transformers makes a {type(tokenizer).__name__} of its {file.name}, which cuts text into other tokens "
            f"than {file.library} does",
            _ONE_FILE,
        )
    if vocabulary is not None and not 0 <= least <= most < vocabulary:
        raise CalibrationError(
            f"The tokenizer in {folder} does not belong to the model.",
            f"it has tokens from {least} to {most}, and the model knows {vocabulary} of them",
            "put the tokenizer that came with the model into the folder",
        )
    return tokenizer


def tokenizer_of(folder: Path, gguf: GgufModel | None) -> Any:
    """The tokenizer of a model whose small files lie in ``folder``; ``gguf`` where they were made from GGUF.

    Raises:
        CalibrationError: as ``load_tokenizer``.
    """
    if gguf is not None and gguf.no_tokenizer:
        raise CalibrationError(
            f"{gguf.path} has no tokenizer that can be used.",
            gguf.no_tokenizer,
            "put tokenizer.json and tokenizer_config.json of the model that it was made from beside the file",
        )
    return load_tokenizer(folder)


def tried_tokenizer(folder: Path, gguf: GgufModel | None = None) -> Any:
    """``tokenizer_of``, or the ``CalibrationError`` that says why there is none that can be used."""
    try:
        return tokenizer_of(folder, gguf)
    except CalibrationError as error:
        return error


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of ``text`` alone, without those that begin or end a sequence.

    Raises:
        CalibrationError: the tokenizer gives up on it.
    """
    with foreign(_cannot_encode):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _config_of(folder: Path) -> tuple[PretrainedConfig, int | None]:
    """A config of the model's kind with the sizes of its class, and how many tokens the model's own has."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = read_settings(folder, CONFIG_FILE) if is_there(folder, CONFIG_FILE) else {}
    kind = settings.get("model_type")
    with foreign(partial(_unusable, folder)):
        known = isinstance(kind, str) and kind in CONFIG_MAPPING
        config: Any = CONFIG_MAPPING[str(kind)]() if known else PretrainedConfig()
    named = settings.get("tokenizer_class")
    if isinstance(named, str):
        config.tokenizer_class = named
    text = settings.get("text_config")
    sizes = [one.get("vocab_size") for one in (settings, text) if isinstance(one, dict)]
    return config, next((size for size in sizes if type(size) is int), None)


def _copy(folder: Path, private: Path) -> None:
    """The tokenizer's files, without names of code and of other files.

    Raises:
        CheckpointError: one of them is damaged, too large, or no plain file of the folder.
    """
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in (SETTINGS, "special_tokens_map.json"):
            settings = _cleaned(read_object(folder, name, _MOST_BYTES))
            _check_settings(path, settings)
            (private / name).write_text(json.dumps(settings), encoding="utf-8")
        elif name in _JSON or any(fnmatchcase(name, pattern) for pattern in _OTHERS):
            (private / name).write_bytes(read_inside(folder, name, _MOST_BYTES))
    templates = folder / TEMPLATES_FOLDER
    if templates.is_dir() and not templates.is_symlink():
        (private / TEMPLATES_FOLDER).mkdir()
        for path in sorted(templates.glob("*.jinja"))[:_MOST_TEMPLATES]:
            data = read_inside(templates, path.name, _MOST_BYTES)
            (private / TEMPLATES_FOLDER / path.name).write_bytes(data)


def _cleaned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``auto_map`` stays: a tokenizer that is nothing but code of its own is refused for it by transformers."""
    kept = {key: value for key, value in settings.items() if key not in _OTHER_FILES}
    cleaned = believed(kept)
    return {**cleaned, "auto_map": kept["auto_map"]} if "auto_map" in kept else cleaned


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Values that transformers believes without a look.

    Raises:
        CheckpointError: names the field.
    """
    for field, value in settings.items():
        why = ""
        if field == "model_max_length" and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            why = "it is a number"
        elif field in ("padding_side", "truncation_side") and value not in _SIDES:
            why = "it is left or right"
        elif field == "tokenizer_class" and not (
            isinstance(value, str | None) and (value or "x").isidentifier()
        ):
            why = "it is the name of a class"
        elif field == "chat_template" and not _is_template(value):
            why = "it is a text, or a list of named texts"
        if why and value is not None:
            raise CheckpointError(
                f"{path} says {field} = {repr(value)[:60]}.",
                why,
                f"put the {path.name} that came with the model into the folder",
            )


def _is_template(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(one, str) for one in value.values())
    if isinstance(value, list):
        return all(
            isinstance(one, dict)
            and all(isinstance(one.get(key), str) for key in ("name", "template"))
            for one in value
        )
    return isinstance(value, str)


def _open(
    folder: Path, private: Path, config: PretrainedConfig, file: VocabularyFile | None
) -> Any:
    with foreign(partial(_why_not, folder, private, file)):
        from transformers import AutoTokenizer, PreTrainedTokenizerBase
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        _check_class(folder, private, config, tokenizer_class_from_name, PreTrainedTokenizerBase)
        ranks = file is not None and file.library == "tiktoken"
        if ranks and config.model_type in _PROGRAM_ALONE and _own_code(private):
            raise _why_not(folder, private, file, "custom code")
        return AutoTokenizer.from_pretrained(
            str(private), config=config, local_files_only=True, trust_remote_code=False
        )


def _check_class(folder: Path, private: Path, config: Any, named: Any, base: type) -> None:
    """``tokenizer_class`` may be anything that transformers exports; only tokenizers are opened."""
    path = private / SETTINGS
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in (settings.get("tokenizer_class"), getattr(config, "tokenizer_class", None)):
        found = named(name) if isinstance(name, str) else None
        if found is not None and not (isinstance(found, type) and issubclass(found, base)):
            raise _unusable(folder, f"its tokenizer_class is {name!r}, which is no tokenizer")


def _why_not(
    folder: Path, private: Path, file: VocabularyFile | None, why: str
) -> CalibrationError:
    """The error for what transformers did not open; its own names the last thing that it tried."""
    what = f"{folder} has no tokenizer that can be used."
    code = "" if is_there(private, "tokenizer.json") else _own_code(private)
    # Of these, what lies in a file of ranks under another name is known to the program alone.
    code_alone = "custom code" in why or (file is not None and file.name.endswith(".tiktoken"))
    if file is not None and file.missing and not (code and code_alone):
        return CalibrationError(
            what,
            f"its vocabulary, {file.name}, is a file of {file.library}, and without "
            f"{' and '.join(file.missing)} it cannot be read",
            f"pip install {' '.join(file.missing)}",
        )
    if code:
        said = f"its tokenizer is a program in the model's folder ({code}), and none is ever run"
        return CalibrationError(what, said, _ONE_FILE)
    return _unusable(folder, why)


def _own_code(private: Path) -> str:
    """The class in the model's own folder that would read its vocabulary; empty where none is named."""
    path = private / SETTINGS
    named = json.loads(path.read_text(encoding="utf-8")).get("auto_map") if path.exists() else None
    found = named.get("AutoTokenizer") if isinstance(named, dict) else None
    classes = found if isinstance(found, list) else [found]
    return next((one[:80] for one in classes if isinstance(one, str)), "")


def _unusable(folder: Path, why: str) -> CalibrationError:
    return CalibrationError(
        f"{folder} has no tokenizer that can be used.",
        why[:200],
        "put the model's tokenizer.json and tokenizer_config.json into the folder",
    )


def _cannot_encode(why: str) -> CalibrationError:
    return CalibrationError(
        "The model's tokenizer cannot read the text.",
        why,
        "put the tokenizer that came with the model into its folder",
    )
