"""The one file that touches transformers' semi-private loading functions.

It builds a model on the meta device, says which checkpoint tensor ends up in which parameter, and loads a *subset* of a
checkpoint with transformers' own renames and expert fusing. When the range of transformers in ``pyproject.toml`` moves,
this file and ``compat.py`` are what to look at.

Peak memory of ``load_subset``: the tensors of the subset once as read and once as fused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from conmoe_edge.errors import CheckpointError, UnsupportedModel
from conmoe_edge.model.config_numbers import check_numbers
from conmoe_edge.model.deepseek import register_config, register_model

_GATED_INPUT = {"llama4", "llama4_text"}


def read_config(folder: str) -> PretrainedConfig:
    """The config of a local model folder. Nothing in the folder is executed.

    Raises:
        UnsupportedModel: transformers does not know the ``model_type``.
        CheckpointError: ``config.json`` cannot be read, or holds numbers that are none.
    """
    register_config()
    try:
        named, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
        check_numbers(folder, named)
        kind = named.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise UnsupportedModel(
                f"The architecture of {folder} is not known to transformers.",
                f'its model_type is "{kind}"' if kind else "its config.json names no model_type",
                "use a model whose architecture is part of transformers; code inside a model folder is never run",
            )
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (UnsupportedModel, CheckpointError):
        raise
    except (
        Exception
    ) as error:  # config classes check foreign data in ways of their own, with any exception
        raise CheckpointError(
            f"{folder}/config.json cannot be used.",
            _one_line(error),
            "download the model again; if it is the same afterwards, the model itself is broken",
        ) from error
    text = config.get_text_config()
    if (
        getattr(config, "model_type", "") in _GATED_INPUT
        or getattr(text, "model_type", "") in _GATED_INPUT
    ):
        raise UnsupportedModel(
            f"{config.model_type} cannot be consolidated.",
            "it multiplies the input of an expert by the routing weight, so weights that meet on one prototype "
            "cannot be added up",
        )
    return config


def _one_line(error: BaseException) -> str:
    """A library's message in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def quantization_of(config: PretrainedConfig) -> str | None:
    """``quant_method`` of a checkpoint that is already quantised, ``None`` for a plain one."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if isinstance(settings, dict):
        return str(settings.get("quant_method", "unknown"))
    return str(getattr(settings, "quant_method", "unknown"))


def build_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM on the meta device in ``dtype``, in eval mode; no memory is taken.

    Raises:
        UnsupportedModel: there is no causal LM for this config.
    """
    register_model()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (
        Exception
    ) as error:  # sizes that contradict each other fail anywhere inside the model's constructor
        raise UnsupportedModel(
            f"transformers cannot build a causal language model of {config.model_type} from this config.json.",
            _one_line(error),
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model.eval()


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
    found = {}
    for key in sorted(keys):
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:
            target = key
        if target in state:
            found[key] = target
    return found


def load_subset(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> None:
    """Load some of the checkpoint's tensors into a (meta) model, renamed and fused as transformers does it.

    Each parameter takes the dtype that the meta parameter has.

    Args:
        model: where the tensors go.
        tensors: checkpoint name -> anything whose ``[...]`` gives the tensor.
        device: where the loaded parameters live.

    Raises:
        CheckpointError: a shape does not fit the config, or tensors of one fused parameter are missing.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    show_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    dtype = next(iter(model.parameters())).dtype
    try:
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
    finally:
        transformers_logging.set_verbosity(verbosity)
        if show_bars:
            transformers_logging.enable_progress_bar()
    for name, found, wanted in sorted(info.mismatched_keys):
        raise CheckpointError(
            f"{name} has the shape {list(found)}, but config.json says {list(wanted)}.",
            "the weights and config.json belong to different models",
        )
    for name, reason in sorted(info.conversion_errors.items()):
        raise CheckpointError(
            f"{name} cannot be assembled from the checkpoint.", _one_line(Exception(reason))
        )


def saved_names(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of some of a model's parameters under the names, and in the pieces, that ``save_pretrained`` writes.

    Args:
        model: of that architecture and those sizes; its own weights are not looked at.
        tensors: parameter or buffer -> its value; a fused parameter with all that it is fused with.
    """
    return {
        name: tensor.contiguous()
        for name, tensor in revert_weight_conversion(model, dict(tensors)).items()
    }


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
                "download the model again; if it is the same afterwards, the model itself is broken",
            )
        if tensor.is_meta:
            raise CheckpointError(
                f"The checkpoint has no tensor for {path}.{name}.",
                "the weights are incomplete or belong to another config.json",
            )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are numbers. NaN and infinity survive a sum; expert by expert, because a
    sum in another dtype converts all that it is given.
    """
    pieces = tensor if tensor.dim() > 2 else [tensor]
    return all(bool(piece.sum(dtype=torch.float32).isfinite()) for piece in pieces)


def tie(model: PreTrainedModel) -> None:
    """Tie what the config says is tied (an output head that shares the embedding)."""
    model.tie_weights()


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
