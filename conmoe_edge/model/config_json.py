"""The small JSON files of a model, read as what they are: data from somebody else.

``read_settings`` reads one with limits on its size, its nesting and the number of its values, refuses what can be read
in two ways (a name that comes twice) and numbers that are none (NaN), and drops every name by which a file could
choose code: attention and expert implementations (which may name a kernel on the hub), classes in the model's own
folder, other files to read in this one's place. What is left are sizes, numbers and words that transformers looks up
in tables of its own.

No torch here. Peak memory: the file, and its values as Python objects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from conmoe_edge.checkpoint.fs.contained import is_there, read_inside
from conmoe_edge.errors import CheckpointError

MOST_BYTES = 16 << 20
"""Of a config; those of the largest models have some hundred kB."""
MOST_DEPTH = 24
MOST_VALUES = 1 << 20
AGAIN = "Download the model again, or copy it again from where it came from."
WRONG = "Download the model again; if it is the same afterwards, the model itself is broken."
COMPARE_CONFIG = (
    "compare config.json with the one on the model's page on the hub; where they are the same, this release of "
    "transformers itself cannot do it: name another model, conmoe-edge models lists some"
)
"""The fix where transformers fails on a config: it may lack a field, or the class may be at fault."""
ANOTHER_MODEL = (
    "run this one as it is, with transformers, say, or name another: conmoe-edge models lists some"
)
"""The fix where a model is whole, and of a kind that cannot be consolidated."""

NAMES_OF_CODE = frozenset(
    {
        # Implementations may be names of kernels on the hub, the others name classes and modules.
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "auto_map",
        "trust_remote_code",
        "code_revision",
        "custom_generate",
        "custom_pipelines",
        "kernel_config",
        "use_kernels",
        "use_hub_kernels",
        "allow_all_kernels",
        "fusion_config",
        "compile_config",
        # Other files in the place of the checked ones.
        "configuration_files",
        "transformers_weights",
        "extra_files",
        "extra_config_files",
        "gguf_file",
    }
)
"""Names that are neither believed nor written on, wherever they stand."""

NOT_FOR_FILES = NAMES_OF_CODE | frozenset(
    {
        "name_or_path",
        # Where and how to run, and what to give back, is the caller's.
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_return_dict",
        "use_cache",
        "torchscript",
        "device_map",
        "distributed_config",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "tp_plan",
        # Labels of classifiers: as many objects as the file says.
        "num_labels",
        "id2label",
        "label2id",
        "problem_type",
        "task_specific_params",
    }
)
"""Names that are not believed; nor is any other name that begins with an underscore."""

_MAY_BE_INFINITE = frozenset({"time_step_limit"})
_TAG = "__float__"
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in ``folder/name`` without ``NOT_FOR_FILES``: what may be believed.

    Raises:
        CheckpointError: missing, no plain file, too large, no JSON object, ambiguous, or with numbers that are none.
    """
    return believed(read_object(folder, name, MOST_BYTES))


def read_to_write(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in ``folder/name`` without ``NAMES_OF_CODE``: what may be written on, for other programs.

    Raises:
        CheckpointError: as ``read_settings``.
    """
    kept = _without(read_object(folder, name, MOST_BYTES), lambda key: key in NAMES_OF_CODE)
    return _in_plain_json(kept)


def read_object(folder: Path, name: str, most_bytes: int) -> dict[str, Any]:
    """The JSON object in ``folder/name``, whole; everything in it is a plain JSON value.

    Raises:
        CheckpointError: as ``read_settings``.
    """
    where = folder / name
    if not is_there(folder, name):
        raise CheckpointError(f"{folder} has no {name}.", "", AGAIN)
    data = read_inside(folder, name, most_bytes)
    try:
        value = json.loads(data, object_pairs_hook=_pairs, parse_constant=_constant)
    except _Twice as error:
        _refuse(where, f"it has the name {str(error)[:60]!r} twice")
    except RecursionError:
        _refuse(where, "it is nested too deep")
    except ValueError as error:
        _refuse(where, str(error).splitlines()[0][:200])
    if not isinstance(value, dict):
        _refuse(where, "it holds no JSON object")
    for count, (path, one, depth) in enumerate(values_of(value), 1):
        if depth > MOST_DEPTH:
            _refuse(where, f"it is nested more than {MOST_DEPTH} deep")
        if count > MOST_VALUES and most_bytes <= MOST_BYTES:
            _refuse(where, f"it has more than {MOST_VALUES} values")
        if isinstance(one, float) and not math.isfinite(one):
            names = set(path.split("."))
            if math.isnan(one) or not names & _MAY_BE_INFINITE:
                raise says(where, path, one, "that is no number")
    return value


def values_of(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any, int]]:
    """Every value in nested lists and objects: its path (``text_config.num_hidden_layers``), itself, how deep it is."""
    stack = [(path, value, depth)]
    while stack:
        where, one, level = stack.pop()
        yield where, one, level
        if isinstance(one, Mapping):
            start = f"{where}." if where else ""
            stack += [(f"{start}{key}", inner, level + 1) for key, inner in one.items()]
        elif isinstance(one, list):
            stack += [(where, inner, level + 1) for inner in one]


def believed(value: Any) -> Any:
    """A copy without ``NOT_FOR_FILES`` and names that begin with an underscore, at every depth. ``__type`` stays: it
    marks a token in a tokenizer's settings.
    """
    return _without(
        value, lambda key: key in NOT_FOR_FILES or (key.startswith("_") and key != "__type")
    )


def _without(value: Any, dropped: Callable[[str], bool]) -> Any:
    if isinstance(value, dict):
        return {key: _without(one, dropped) for key, one in value.items() if not dropped(key)}
    return [_without(one, dropped) for one in value] if isinstance(value, list) else value


def _in_plain_json(value: Any) -> Any:
    """Infinity as transformers writes it; JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _in_plain_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_in_plain_json(one) for one in value]
    if isinstance(value, float) and math.isinf(value):
        return {_TAG: "Infinity" if value > 0 else "-Infinity"}
    return value


def says(where: Path, field: str, value: Any, why: str) -> CheckpointError:
    """The error for a field with a value that cannot be."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return CheckpointError(f"{where} says {field} = {shown}.", why, WRONG)


class _Twice(Exception):
    """A name comes twice in one object."""


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    if len(found) == 1 and isinstance(tag := found.get(_TAG), str) and tag in _SPECIAL:
        return _SPECIAL[tag]  # as transformers writes numbers that JSON has no word for
    return found


def _constant(word: str) -> float:
    return _SPECIAL[word]


def _refuse(where: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{where} is damaged.", why, AGAIN)
