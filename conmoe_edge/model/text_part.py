"""The text model inside a model that takes pictures, video or sound as well.

transformers has one class for all of it (``...ForConditionalGeneration``). With tokens alone it runs the text model and
the output head, and nothing else. So the text model is that class without its other parts: ``keep_text`` puts an
``Absent`` in the place of each, which has no weights and refuses to run. Positions, masks and generation stay the
class's own.

No memory: what is removed is a meta tensor, or was not loaded yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NoReturn

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from conmoe_edge.errors import UnsupportedModel, UsageError
from conmoe_edge.model.auto_names import TAKES_PICTURES, register_text_parts
from conmoe_edge.model.experts import find_decoder, is_experts_module
from conmoe_edge.model.no_causal_lm import another_model


class Absent(nn.Module):
    """Stands where a part for pictures or sound was. It has no weights."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            UsageError: always.
        """
        raise _text_only()

    @property
    def dtype(self) -> NoReturn:
        """What classes ask for before they call it; refuses likewise."""
        raise _text_only()


def _text_only() -> UsageError:
    return UsageError(
        "The model was loaded for text only.",
        "its parts for pictures, video and sound are not in memory",
        "open a package of conmoe-edge fit MODEL --keep-vision with transformers' AutoModelForImageTextToText",
    )


def keep_text(model: PreTrainedModel) -> tuple[str, ...]:
    """Remove what a forward of tokens alone does not run; the paths of the removed modules.

    Args:
        model: on the meta device. One that takes text alone, or has no routed experts, stays as it is.

    Raises:
        UnsupportedModel: a decoder layer has experts for several kinds of input.
    """
    removed = other_parts(model)
    for path in removed:
        model.set_submodule(path, Absent())
    return removed


def other_parts(model: PreTrainedModel) -> tuple[str, ...]:
    """Paths of what ``keep_text`` removes; arguments and errors as there."""
    decoder = find_decoder(model)
    if decoder is None:
        return ()
    _refuse_mixed(model, decoder.prefix)
    return tuple(_beside(model, decoder.prefix))


def absent_in(model: nn.Module) -> frozenset[str]:
    """Paths of the modules that ``keep_text`` removed."""
    return frozenset(path for path, one in model.named_modules() if isinstance(one, Absent))


def lies_in(paths: Collection[str], name: str) -> bool:
    """Whether a tensor belongs to one of the modules at ``paths``, or to a module inside of it."""
    pieces = name.split(".")
    return any(".".join(pieces[:end]) in paths for end in range(1, len(pieces)))


def has_whole_class(config: PretrainedConfig) -> bool:
    """Whether transformers has a class for all of a model that takes more than text."""
    return not takes_text_alone(config) and config.model_type in getattr(
        modeling_auto, TAKES_PICTURES
    )


def text_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class by which ``from_pretrained`` loads the text part of a model that takes pictures or sound too, so that
    no weight of the rest is read; ``None`` where ``AutoModelForCausalLM`` gives no more than text.
    """
    register_text_parts(modeling_auto)
    whole: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if (
        whole is None
        or not issubclass(type(config), whole.config_class)
        or takes_text_alone(config)
    ):
        return None

    def build(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        keep_text(self)

    # transformers looks up renames, and users what they have, by the class's own name.
    own = {"__init__": build, "__module__": whole.__module__, "__qualname__": whole.__qualname__}
    return type(whole.__name__, (whole,), own)


def takes_text_alone(config: PretrainedConfig) -> bool:
    """Whether a model is a text model and nothing else."""
    return config.get_text_config() is config


def _beside(model: PreTrainedModel, decoder: str) -> Iterator[str]:
    """Modules with weights beside the way from the model down to its text model, the output head excepted."""
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    above: nn.Module = model
    path = ""
    for name in decoder.split("."):
        if _is_text(above, text):
            return
        for other, module in above.named_children():
            if other != name and module is not head and _has_weights(module):
                yield f"{path}{other}"
        path = f"{path}{name}."
        above = above.get_submodule(name)


def _is_text(module: nn.Module, text: PretrainedConfig) -> bool:
    """Whether a module is built from the config of the text model; building may have copied it."""
    config = getattr(module, "config", None)
    return isinstance(module, PreTrainedModel) and (
        config is text or getattr(config, "model_type", None) == text.model_type
    )


def _refuse_mixed(model: PreTrainedModel, decoder: str) -> None:
    layers: nn.ModuleList = model.get_submodule(decoder)  # type: ignore[assignment]
    for index, layer in enumerate(layers):
        sets = sum(is_experts_module(one) for one in layer.modules())
        if sets > 1:
            raise UnsupportedModel(
                f"{model.config.model_type} cannot be consolidated.",
                f"decoder layer {index} has {sets} sets of routed experts, for text and for other input",
                another_model(model.config),
            )


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
