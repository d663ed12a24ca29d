"""``generation_config.json``: how a model's publisher would have its answers drawn and ended.

transformers would take everything in it, the names of caches, compilers and functions included, and check little. Here
a field is a number of a known range, a truth value or tokens of the model, or it is not taken. Without the file, the
same fields of ``config.json`` count, as they do for transformers.

Memory: the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from conmoe_edge.checkpoint.fs.contained import is_there
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE
from conmoe_edge.model.config_json import read_settings, says
from conmoe_edge.model.foreign import quiet

GENERATION_FILE = "generation_config.json"

_MOST = 1 << 31
_COUNTS = {
    "top_k": 0,
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
}
"""Whole numbers, and the least value of each."""
_NUMBERS = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6),
}
_TRUTHS = ("do_sample", "use_cache")
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")


def read_generation(folder: Path, vocabulary: int) -> GenerationConfig:
    """The known fields of ``generation_config.json``, or of ``config.json`` where there is no such file.

    Args:
        folder: of the model or package.
        vocabulary: tokens that the model knows.

    Raises:
        CheckpointError: the file is damaged, or a field has a value that cannot be; names the field.
    """
    own = is_there(folder, GENERATION_FILE)
    name = GENERATION_FILE if own else CONFIG_FILE
    settings = read_settings(folder, name)
    if not own and isinstance(text := settings.get("text_config"), dict):
        settings = {**text, **settings}
    kept = _checked(folder / name, settings, vocabulary, only_tokens=not own)
    with quiet():
        return GenerationConfig(**kept)


def _checked(
    where: Path, settings: Mapping[str, Any], vocabulary: int, *, only_tokens: bool
) -> dict[str, Any]:
    """``only_tokens``: of a ``config.json`` that has other fields under the same names."""
    kept: dict[str, Any] = {}
    for field in _TOKENS:
        if (value := settings.get(field)) is not None:
            kept[field] = _tokens(where, field, value, vocabulary)
    if only_tokens:
        return kept
    for field, least in _COUNTS.items():
        if (value := settings.get(field)) is not None:
            if type(value) is not int or not least <= value < _MOST:
                raise says(where, field, value, f"it is a whole number from {least} on")
            kept[field] = value
    for field, (least, most) in _NUMBERS.items():
        if (value := settings.get(field)) is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                raise says(where, field, value, f"it is a number from {least:g} to {most:g}")
            kept[field] = float(value)
    for field in _TRUTHS:
        if (value := settings.get(field)) is not None:
            if not isinstance(value, bool):
                raise says(where, field, value, "it is true or false")
            kept[field] = value
    return kept


def _tokens(where: Path, field: str, value: Any, vocabulary: int) -> int | list[int] | None:
    """Tokens of the model. Only what ends an answer must be one: -1 in another place is a usual word for none."""
    several = field == "eos_token_id" and isinstance(value, list)
    tokens: list[Any] = value if several else [value]
    if any(type(token) is not int for token in tokens):
        raise says(
            where,
            field,
            value,
            "it is a token's number" + ", or a list of them" * (field == "eos_token_id"),
        )
    if any(not 0 <= token < vocabulary for token in tokens):
        if field == "eos_token_id":
            raise says(
                where,
                field,
                value,
                f"the model has tokens from 0 to {vocabulary - 1}, so no answer would end",
            )
        return None
    return (value or None) if several else value
