"""A model as its publisher's own files name it, built by transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from conmoe_edge.model import bridge


def knows(config: dict[str, Any]) -> bool:
    """Whether transformers, or this project, has the architecture."""
    bridge.register_model()
    return config.get("model_type") in CONFIG_MAPPING


def build(config: dict[str, Any], dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model whose weights the publisher stores, with its vision parts where it has them.

    Args:
        config: as ``config.json`` has it; what it says of quantisation is left out.
        dtype: of all parameters.
        device: ``meta`` takes no memory.
    """
    bridge.register_model()
    config = {k: v for k, v in copy.deepcopy(config).items() if k != "quantization_config"}
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    ours = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    cls = _class_of(config.get("architectures"), type(ours))
    with torch.device(device):
        if cls is None:
            return AutoModelForCausalLM.from_config(ours, dtype=dtype, trust_remote_code=False)
        return cls._from_config(ours, dtype=dtype)


def load(folder: Path) -> PreTrainedModel:
    """The model in ``folder`` as transformers has it, in fp32, its experts computed one by one."""
    bridge.register_model()
    settings = json.loads((folder / "config.json").read_text())
    cls = _class_of(settings.get("architectures"), CONFIG_MAPPING[settings["model_type"]])
    opened: Any = cls or AutoModelForCausalLM
    return opened.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", trust_remote_code=False
    ).eval()


def _class_of(names: Any, config_class: type) -> type[PreTrainedModel] | None:
    """The class that ``architectures`` names, if it is made from this config; ``None`` for the causal model."""
    for name in names or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "config_class", None) is config_class:
            return found
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    for mapping in (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    ):
        known = getattr(transformers, mapping)
        if config_class in known:
            return known[config_class]
    return None


def checkpoint_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the publisher's files hold, in the model's own order."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    own = {
        name: torch.empty(one.shape, device="meta")
        for name, one in model.state_dict().items()
        if name not in tied
    }
    return {name: tuple(one.shape) for name, one in bridge.saved_names(model, own).items()}
