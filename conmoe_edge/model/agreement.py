"""Whether a config and the tensors of its checkpoint describe the same model, found from the headers alone.

transformers' own loader runs on the meta device with tensors that have a shape and nothing else. So renames, fused
experts and transposes are its own, and what it could not place is known before a byte of a weight is read. Three
things are faults: a parameter that no tensor fills, a tensor of another shape, and a tensor that the model has no place
for. The last one would make a wrong answer without any error: a config that leaves out biases, or the last layers. What
does no harm is known by name (``harmless_tensors.py``).

Memory: Python objects for each tensor, and a list of names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from conmoe_edge.checkpoint.package.dense_names import DENSE_SCALE
from conmoe_edge.errors import CheckpointError
from conmoe_edge.model import bridge
from conmoe_edge.model.config_json import AGAIN, WRONG
from conmoe_edge.model.harmless_tensors import STALE, is_harmless
from conmoe_edge.model.text_part import Absent, lies_in

Shapes = Mapping[str, tuple[int, ...]]

_EXTRA_LAYERS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_num_hidden_layers",
)
"""Layers behind the last one that predict further tokens and that no answer needs."""


def check_agreement(
    model: PreTrainedModel,
    prefix: str,
    shapes: Shapes,
    targets: Mapping[str, str],
    elsewhere: Collection[str] = (),
) -> None:
    """Raise unless every parameter has its tensors, in its shape, and every tensor has its place or does no harm.

    Args:
        model: on the meta device, all of it; its parameters are meta tensors afterwards as well.
        prefix: path of its decoder layers.
        shapes: all tensors of the checkpoint.
        targets: as ``bridge.targets_of`` has them.
        elsewhere: parameters that come from somewhere else: the experts of a package are records.

    Raises:
        CheckpointError: names the tensor.
    """
    check_places(model, prefix, shapes, targets)
    parameters = dict(model.state_dict())
    # A tied parameter has its numbers from another one.
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    others = tied | {*elsewhere}
    own = {name: tensor for name, tensor in parameters.items() if name not in others}
    wanted = {name: tuple(one.shape) for name, one in _as_saved(model, own).items()}
    if targets.keys() <= wanted.keys() and all(shapes.get(n) == s for n, s in wanted.items()):
        return  # as transformers itself would write this model; the loader needs seconds for large ones
    _check_numbers(targets)
    empty = {name: torch.empty(shapes[name], device="meta") for name in targets}
    outcome = bridge.convert(model, empty, torch.device("meta"))
    lacking = {name for name in outcome.missing if name not in others}
    lacking -= {name for name in lacking if _ignored(name, model._keys_to_ignore_on_load_missing)}
    wrong = {*outcome.mismatched, *outcome.failed}
    if not lacking and not wrong:
        return
    first = min(lacking | wrong, key=_natural)
    raise _what_is_wrong(model, first, parameters, shapes, targets)


def check_places(
    model: PreTrainedModel, prefix: str, names: Iterable[str], targets: Mapping[str, str]
) -> None:
    """Raise for the first tensor that the model has no place for and that is not known to do no harm.

    Raises:
        CheckpointError: names the tensor.
    """
    layers = len(model.get_submodule(prefix))  # type: ignore[arg-type]
    text = model.config.get_text_config()
    extra = max(
        (value for name in _EXTRA_LAYERS if type(value := getattr(text, name, None)) is int),
        default=0,
    )
    # The scales of dense weights that a package stores in fewer bits.
    scales = {f"{name}{DENSE_SCALE}" for name in targets}
    strangers = sorted({*names} - {*targets} - scales, key=_natural)
    ignored = model._keys_to_ignore_on_load_unexpected
    absent = {path for path, module in model.named_modules() if isinstance(module, Absent)}
    for name, renamed in bridge.renamed(model, strangers).items():
        inside = re.match(rf"{re.escape(prefix)}\.(\d+)\.", renamed)
        if renamed.endswith(STALE) or _ignored(renamed, ignored) or _ignored(name, ignored):
            continue
        if inside is None and (
            lies_in(absent, renamed) or is_harmless(name) or is_harmless(renamed)
        ):
            continue
        if inside is None or int(inside[1]) < layers:
            why = (
                "config.json describes a model that has no such tensor, and without it every answer "
                "would be another one"
            )
        elif int(inside[1]) >= layers + extra:
            why = f"config.json describes {layers} layers"
        else:
            continue
        raise CheckpointError(f"The tensor {name} has no place in the model.", why, WRONG)


def _check_numbers(targets: Mapping[str, str]) -> None:
    """The tensors that are stacked into one parameter are numbered from 0 without a gap; otherwise the loader would
    put them into a row all the same, each in a wrong place.
    """
    parts: dict[tuple[str, str], list[list[int]]] = {}
    for name, target in targets.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        parts.setdefault((target, pattern), []).append(
            [int(one) for one in re.findall(r"(?<=\.)(\d+)(?=\.|$)", name)]
        )
    for (_, pattern), rows in parts.items():
        for column, values in enumerate(zip(*rows, strict=True)):
            found = set(values)
            if len(found) > 1 and found != set(range(len(found))):
                row = [*rows[0]]
                row[column] = next(number for number in range(len(found)) if number not in found)
                filled = zip(pattern.split("*"), [*map(str, row), ""], strict=True)
                raise _missing("".join(piece + number for piece, number in filled))


def _what_is_wrong(
    model: PreTrainedModel,
    parameter: str,
    parameters: Mapping[str, Any],
    shapes: Shapes,
    targets: Mapping[str, str],
) -> CheckpointError:
    """The tensor at fault under the name that it has, or would have, in the checkpoint."""
    module = parameter.rpartition(".")[0]
    beside = {name: one for name, one in parameters.items() if name.rpartition(".")[0] == module}
    wanted = _as_saved(model, beside)
    into = bridge.renamed(model, wanted)
    present = [name for name, target in targets.items() if target == parameter]
    for name in sorted(wanted, key=_natural):
        if into[name] != parameter:
            continue
        if name not in shapes:
            # Under other names (all experts in one tensor, say) it may well be there.
            if not present or any(one in shapes for one in wanted if into[one] == parameter):
                return _missing(name)
        elif shapes[name] != tuple(wanted[name].shape):
            return wrong_shape(name, shapes[name], tuple(wanted[name].shape))
    if not present:
        return _missing(parameter)
    if wanted and (extra := sorted({*present} - {*wanted}, key=_natural)):
        return CheckpointError(
            f"The tensor {extra[0]} has no place in the model.",
            f"{parameter} is made of {len(present)} tensors, and config.json describes a smaller one",
            WRONG,
        )
    return wrong_shape(present[0], shapes[present[0]], None)


def _as_saved(model: PreTrainedModel, parameters: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The names and shapes under which transformers writes these parameters; none where it cannot tell."""
    shapes_only = {name: torch.empty(one.shape, device="meta") for name, one in parameters.items()}
    with suppress(CheckpointError):
        return bridge.saved_names(model, shapes_only)
    return {}


def _missing(name: str) -> CheckpointError:
    return CheckpointError(
        f"The tensor {name} is missing.",
        "the model that config.json describes needs it, and no weights file has it",
        AGAIN,
    )


def wrong_shape(
    name: str, found: tuple[int, ...], wanted: tuple[int, ...] | None
) -> CheckpointError:
    """The error for a tensor of another shape than the config says; ``wanted`` where that is known."""
    says = "another one" if wanted is None else str(list(wanted))
    return CheckpointError(
        f"{name} has the shape {list(found)}, but config.json says {says}.",
        "the weights and config.json belong to different models",
        WRONG,
    )


def _ignored(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]
