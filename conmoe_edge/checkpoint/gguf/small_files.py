"""A folder with what a plain checkpoint has beside its weights, made from GGUF metadata: config, generation config and
tokenizer.

What reads a model's small files elsewhere reads these, with the same checks. The folder is temporary; it goes when the
model is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conmoe_edge.checkpoint.fs.contained import is_there, read_inside
from conmoe_edge.checkpoint.gguf.files import GgufFiles
from conmoe_edge.checkpoint.gguf.vocabulary import (
    differs_from,
    end_tokens,
    refusal_of,
    tokenizer_of,
)
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE
from conmoe_edge.errors import ConmoeError

TOKENIZER_FILE = "tokenizer.json"
_BESIDE = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def write_small_files(folder: Path, files: GgufFiles, config: Mapping[str, Any]) -> str:
    """Write them into ``folder``, which is empty.

    Returns:
        Why there is no tokenizer, as half a sentence; empty where there is one.

    Raises:
        CheckpointError: a tokenizer's file beside the model is no plain file of its folder.
    """
    ends = end_tokens(files.metadata)
    begins = files.metadata.get("tokenizer.ggml.bos_token_id")
    tokens: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    if type(begins) is int and begins < config["vocab_size"]:
        tokens["bos_token_id"] = begins
    _write(folder / CONFIG_FILE, {**config, **tokens})
    if ends:
        _write(folder / "generation_config.json", tokens)
    return _tokenizer(folder, files)


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _tokenizer(folder: Path, files: GgufFiles) -> str:
    source = files.path.parent
    beside = ""
    if is_there(source, TOKENIZER_FILE):
        data = read_inside(source, TOKENIZER_FILE)
        if _belongs(data, files.metadata):
            for name in _BESIDE:
                if is_there(source, name):
                    (folder / name).write_bytes(read_inside(source, name))
            return ""
        beside = f"; {TOKENIZER_FILE} beside it belongs to another model"
    why = refusal_of(files.metadata)
    if not why:
        try:
            tokenizer_of(files.metadata).save_pretrained(folder)
        except (ConmoeError, MemoryError):
            raise
        except Exception as error:  # of the libraries, over a stranger's vocabulary
            why = f"its vocabulary cannot be: {' '.join(str(error).split())[:100]}"
    return why + beside * bool(why)


def _belongs(data: bytes, metadata: Mapping[str, Any]) -> bool:
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_buffer(data).get_vocab()
    except Exception:  # the only class that the library raises
        return False
    return not differs_from(metadata, vocabulary)
