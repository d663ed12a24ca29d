"""The one file that touches transformers' semi-private loading functions.

It builds a model on the meta device, says which checkpoint tensor ends up in which parameter, and loads a *subset* of a
checkpoint with transformers' own renames and expert fusing. When the range of transformers in ``pyproject.toml`` moves,
this file and ``compat.py`` are what to look at.

Peak memory of ``load_subset``: the tensors of the subset once as read and once as fused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conmoe_edge.checkpoint.format.dtypes import CODES, PLAIN
from conmoe_edge.checkpoint.tensors.folder_check import check_folder
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE
from conmoe_edge.errors import CheckpointError, UnsupportedModel
from conmoe_edge.model.auto_names import register_text_parts
from conmoe_edge.model.build_limits import build_limit
from conmoe_edge.model.config_json import (
    AGAIN,
    ANOTHER_MODEL,
    COMPARE_CONFIG,
    WRONG,
    read_settings,
    says,
    values_of,
)
from conmoe_edge.model.deepseek import register_config, register_model
from conmoe_edge.model.foreign import foreign
from conmoe_edge.model.no_causal_lm import no_causal_lm
from conmoe_edge.model.size_bounds import SizeBounds, bounds_in
from conmoe_edge.model.text_part import has_whole_class, keep_text

_GATED_INPUT = {"llama4", "llama4_text"}
_DTYPES = ("dtype", "torch_dtype")
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
_NO_CODE = "use a model whose architecture is part of transformers; code inside a model folder is never run"


def read_config(
    folder: str | Path,
    bounds: SizeBounds | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The config of a local model or package. Nothing in the folder is executed, and no size in it is larger than
    anything in the headers of the weights.

    Args:
        folder: holds ``config.json``.
        bounds: what the headers show; by default they are read from the folder.
        settings: what ``read_settings`` gave of the file, where it is read already.

    Raises:
        UnsupportedModel: transformers does not know the ``model_type``.
        CheckpointError: ``config.json`` cannot be read, or names impossible numbers.
    """
    folder = Path(folder)
    check_folder(folder)
    where = folder / CONFIG_FILE
    settings = read_settings(folder, CONFIG_FILE) if settings is None else settings
    check_known(folder, settings)
    kind = settings["model_type"]
    (bounds or bounds_in(folder)).check(where, settings)
    _check_words(where, settings)
    broken = partial(_cannot_be_used, where)
    with foreign(broken):
        of_kind: Any = CONFIG_MAPPING[kind]
        config: PretrainedConfig = of_kind.from_dict(
            # What is stored as an attribute must not stand in the place of a method.
            {
                name: value
                for name, value in settings.items()
                if not callable(getattr(of_kind, name, None))
            }
        )
        config.name_or_path = str(folder)
        text: Any = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        raise _cannot_be_used(where, f"a {config.model_type} has no parts, and one stands in it")
    if {getattr(config, "model_type", ""), getattr(text, "model_type", "")} & _GATED_INPUT:
        raise UnsupportedModel(
            f"{config.model_type} cannot be consolidated.",
            "it multiplies the input of an expert by the routing weight, so weights that meet on one prototype "
            "cannot be added up",
            ANOTHER_MODEL,
        )
    return config


def check_known(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a model whose architecture transformers does not have; ``settings`` are those of its ``config.json``.

    Raises:
        UnsupportedModel: says what it calls itself.
    """
    register_config()
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"The architecture of {folder} is not known to transformers.",
            f"its model_type is {str(kind)[:60]!r}"
            if kind
            else "its config.json names no model_type",
            _NO_CODE,
        )


def _check_words(where: Path, settings: Mapping[str, Any]) -> None:
    """Words that transformers looks up in torch or in lists without asking what they are."""
    for path, value, _ in values_of(settings):
        if path.rsplit(".", 1)[-1] in _DTYPES and value is not None:
            name = value.removeprefix("torch.") if isinstance(value, str) else ""
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise says(where, path, value, "torch has no such format for weights")
    names = settings.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(one, str) for one in names)
    ):
        raise says(where, "architectures", names, "it is a list of names")
    quantized = settings.get("quantization_config")
    if quantized is not None and not isinstance(quantized, dict):
        raise says(where, "quantization_config", quantized, "it is an object")


def _cannot_be_used(where: Path, why: str) -> CheckpointError:
    """The error for what transformers' config classes refuse; theirs name the field."""
    return CheckpointError(f"{where} cannot be used.", why, WRONG)


def quantization_of(config: PretrainedConfig) -> str | None:
    """``quant_method`` of a checkpoint that is already quantised, ``None`` for a plain one."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if isinstance(settings, dict):
        return str(settings.get("quant_method", "unknown"))
    return str(getattr(settings, "quant_method", "unknown"))


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a package's config that describes the plain model."""
    plain = copy.deepcopy(config)
    for one in {id(c): c for c in (plain, plain.get_text_config())}.values():
        if hasattr(one, "quantization_config"):
            delattr(one, "quantization_config")
    return plain


def build_meta(
    config: PretrainedConfig, dtype: torch.dtype, tensors: int | None = None
) -> PreTrainedModel:
    """The causal LM on the meta device in ``dtype``, in eval mode; no memory is taken. Of a model that takes pictures
    or sound too it is the text part (``text_part.py``).

    ``tensors`` is how many the checkpoint has, where that is known: a model of many times as many parameters is given
    up while it is built.

    Raises:
        UnsupportedModel: there is no causal LM for this config.
        CheckpointError: the config describes a far larger model.
    """
    register_model()
    register_text_parts(modeling_auto)
    if type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise no_causal_lm(config)
    with (
        foreign(lambda why: _cannot_build(config, why)),
        build_limit(tensors),
        torch.device("meta"),
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    keep_text(model)
    return model.eval()


def build_whole(config: PretrainedConfig, tensors: int | None = None) -> PreTrainedModel:
    """As ``build_meta``, but with the parts for pictures and sound, where transformers has a class with them."""
    if not has_whole_class(config):
        return build_meta(config, torch.bfloat16, tensors)
    with (
        foreign(lambda why: _cannot_build(config, why)),
        build_limit(tensors),
        torch.device("meta"),
    ):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        )
    return model.eval()


def _cannot_build(config: PretrainedConfig, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"transformers cannot build a causal language model of {config.model_type} from this config.json.",
        why,
        COMPARE_CONFIG,
    )


def _split(mapping: Iterable[Any]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    entries = list(mapping)
    return (
        [entry for entry in entries if isinstance(entry, WeightRenaming)],
        [entry for entry in entries if isinstance(entry, WeightConverter)],
    )


def targets_of(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Checkpoint tensor -> parameter or buffer of the model that it ends up in.

    Tensors that the model has no place for (heads for multi-token prediction, stale buffers) are left out.
    """
    renamings, converters = _split(get_model_conversion_mapping(model))
    state = model.state_dict()

    def target_of(key: str) -> str | None:
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:
            target = key
        return target if target in state else None

    alike: dict[str, list[str]] = {}
    for key in keys:
        alike.setdefault(_EXPERT_NUMBER.sub(".experts.*.", key), []).append(key)
    found: dict[str, str] = {}
    for group in alike.values():
        # What the first and the last expert of a layer are fused into, the others are.
        first, last = target_of(group[0]), target_of(group[-1])
        same = first == last and first is not None
        for key in group:
            target = first if same else target_of(key)
            if target is not None:
                found[key] = target
    return dict(sorted(found.items()))


def renamed(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> the name that transformers' renames make of it, whether the model has it or not."""
    renamings, converters = _split(get_model_conversion_mapping(model))
    state = model.state_dict()
    return {
        key: rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0]
        for key in keys
    }


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of the tensors that transformers' loader was given.

    Attributes:
        missing: parameters and buffers that none of them filled.
        mismatched: parameter -> (shape that came, shape that the config says).
        failed: parameters whose tensors could not be put together.
    """

    missing: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    failed: frozenset[str]


def convert(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> Conversion:
    """Put some of the checkpoint's tensors into a (meta) model, renamed and fused as transformers does it. Arguments as
    of ``load_subset``.

    Raises:
        CheckpointError: the loader itself gives up.
    """
    dtype = next(iter(model.parameters())).dtype
    with foreign(_cannot_load):
        info, _ = convert_and_load_state_dict_in_model(
            model,
            dict(tensors),
            LoadStateDictConfig(
                weight_mapping=get_model_conversion_mapping(model),  # pyright: ignore[reportArgumentType]
                dtype=dtype,
                dtype_plan=model._get_dtype_plan(dtype),
                device_map={"": device},
            ),
        )
    return Conversion(
        frozenset(info.missing_keys),
        {name: (tuple(found), tuple(wanted)) for name, found, wanted in info.mismatched_keys},
        frozenset(info.conversion_errors),
    )


def _cannot_load(why: str) -> CheckpointError:
    return CheckpointError(
        "The weights cannot be put together as config.json describes them.", why, AGAIN
    )


def load_subset(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> None:
    """Load some of the checkpoint's tensors into a (meta) model, renamed and fused as transformers does it.

    Each parameter takes the dtype that the meta parameter has.

    Args:
        model: where the tensors go.
        tensors: checkpoint name -> anything whose ``[...]`` gives the tensor.
        device: where the loaded parameters live.

    Raises:
        CheckpointError: a shape does not fit the config, tensors of one fused parameter are missing, or one is stored
            in a format that no plain checkpoint has.
    """
    for name, tensor in tensors.items():
        _check_plain(name, tensor)
    outcome = convert(model, tensors, device)
    for name, (found, wanted) in sorted(outcome.mismatched.items()):
        raise CheckpointError(
            f"{name} has the shape {list(found)}, but config.json says {list(wanted)}.",
            "the weights and config.json belong to different models",
            WRONG,
        )
    for name in sorted(outcome.failed):
        raise CheckpointError(
            f"{name} cannot be assembled from the checkpoint.",
            "one of the tensors that it is made of is missing or has another shape",
            AGAIN,
        )


def _check_plain(name: str, tensor: Any) -> None:
    """The loader would cast any number to the parameter's format: the bytes of a quantised weight, too."""
    code = CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code not in PLAIN:
        raise CheckpointError(
            f"The tensor {name} is stored as {code}.",
            "that is a number of a quantised weight, which nothing has expanded",
            WRONG,
        )


def saved_names(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of some of a model's parameters under the names, and in the pieces, that ``save_pretrained`` writes.

    Args:
        model: of that architecture and those sizes; its own weights are not looked at.
        tensors: parameter or buffer -> its value; a fused parameter with all that it is fused with.

    Raises:
        CheckpointError: transformers cannot turn its own renames around.
    """
    with foreign(_cannot_load):
        written = revert_weight_conversion(model, dict(tensors))
    return {name: tensor.contiguous() for name, tensor in written.items()}


def check_loaded(module: nn.Module, path: str, absent: Sequence[str] = ()) -> None:
    """Raise ``CheckpointError`` for the first tensor of ``module`` that no file had or that holds NaN or infinity.

    ``absent`` are the last names of parameters that are meant to be missing.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta and name.rsplit(".", 1)[-1] in absent:
            continue
        if not tensor.is_meta and tensor.is_floating_point() and not _finite(tensor):
            raise CheckpointError(
                f"{path}.{name} holds NaN or infinity.",
                "nothing that is computed from it can be right",
                WRONG,
            )
        if tensor.is_meta:
            raise CheckpointError(
                f"The checkpoint has no tensor for {path}.{name}.",
                "the weights are incomplete or belong to another config.json",
                AGAIN,
            )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are numbers. NaN and infinity survive a sum; expert by expert, because a
    sum in another dtype converts all that it is given.
    """
    pieces = tensor if tensor.dim() > 2 else [tensor]
    return all(bool(piece.sum(dtype=torch.float32).isfinite()) for piece in pieces)


def tie(model: PreTrainedModel) -> None:
    """Tie what the config says is tied (an output head that shares the embedding).

    Raises:
        CheckpointError: the checkpoint has numbers of its own for it.
    """
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        own, shared = _tensor_at(model, name), _tensor_at(model, source)
        if own is None or shared is None or own.is_meta or shared.is_meta or own is shared:
            continue
        if not torch.equal(own, shared):
            raise CheckpointError(
                f"config.json says that {name} is {source}, but they have different numbers.",
                "one of the two would be lost, and every answer would be another one",
                WRONG,
            )
    model.tie_weights()


def _tensor_at(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def fill_buffers(model: PreTrainedModel, within: str, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies and the like) for modules below ``within``.

    ``within`` is a module path, ``""`` for the whole model. Only modules that own such buffers and whose parameters are
    all loaded (or that have none) are touched; parameters that were loaded keep their values.
    """
    owners: dict[str, PreTrainedModel] = {}
    base: PreTrainedModel = model
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[path] = module
        inside = not within or path == within or path.startswith(f"{within}.")
        if not inside or not module._non_persistent_buffers_set:
            continue
        own = dict(module.named_parameters(recurse=False))
        if any(parameter.is_meta for parameter in own.values()):
            continue
        missing = [
            name
            for name in sorted(module._non_persistent_buffers_set)
            if module._buffers.get(name) is not None and module._buffers[name].is_meta  # type: ignore[union-attr]
        ]
        for name in missing:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)  # type: ignore[arg-type]
        if missing:
            owner = max(
                (p for p in owners if not p or path.startswith(f"{p}.") or path == p),
                key=len,
                default="",
            )
            with torch.no_grad():
                owners.get(owner, base)._init_weights(module)
