"""Which field of a config says how many experts a model has, and how many neurons each of them.

No table of model names: a field is the one if the model that transformers builds from the config with another value
in it (on the meta device, no memory) differs in nothing but that. ``SizeChange`` says which tensors shrink, on which
axis; those outside the experts are the router's. Peak memory: two models on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.bridge import build_meta
from conmoe_edge.model.experts import find_experts, part_names

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class SizeChange:
    """A config field, and what another value of it changes.

    Attributes:
        field: its name in ``config.json``.
        axes: tensor outside the experts -> the axis that follows the field.
    """

    field: str
    axes: Mapping[str, int]


def experts_field(config: PretrainedConfig, count: int, wanted: int) -> SizeChange:
    """The field that gives the number of experts, ``count`` now.

    Raises:
        UnsupportedModel: there is none, or more than one that would do.
    """
    found = _candidates(config, count, wanted, expert_axis=True)
    if len(found) != 1:
        raise UnsupportedModel(
            f"The config of {config.model_type} has no one field for the number of experts.",
            _why(found),
            "conmoe-edge chat runs the package as it is",
        )
    return found[0]


def width_field(config: PretrainedConfig, width: int, wanted: int) -> SizeChange | None:
    """The field that gives an expert's neurons and nothing else; ``None`` where there is no such field: the one that
    gives them is also that of shared experts or dense layers, say.
    """
    found = _candidates(config, width, wanted, expert_axis=False)
    return found[0] if len(found) == 1 and not found[0].axes else None


def set_field(config: PretrainedConfig, field: str, value: int) -> PretrainedConfig:
    """A copy of the config with another value in one field of its text part."""
    changed = copy.deepcopy(config)
    setattr(changed.get_text_config(), field, value)
    return changed


def _candidates(
    config: PretrainedConfig, value: int, wanted: int, *, expert_axis: bool
) -> list[SizeChange]:
    text = config.get_text_config()
    fields = sorted(
        name
        for name, held in text.to_dict().items()
        if type(held) is int and held == value and name not in _NEVER
    )
    base = build_meta(config, torch.float32)
    before = _shapes(base)
    experts = _expert_names(base, biases_of_down=expert_axis)
    found = []
    for field in fields:
        try:
            model = build_meta(set_field(config, field, wanted), torch.float32)
        except UnsupportedModel:
            continue  # the field has another meaning, in which this value is impossible
        axes = _axes(before, _shapes(model), value, wanted)
        if axes is None or not experts <= set(axes):
            continue
        if any((axes[name] == 0) != expert_axis for name in experts):
            continue
        found.append(SizeChange(field, {n: a for n, a in axes.items() if n not in experts}))
    return found


_NEVER = frozenset({"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"})
"""Fields whose change would only cost time."""


def _axes(before: Shapes, after: Shapes, value: int, wanted: int) -> dict[str, int] | None:
    """Tensor -> its one axis that went from a multiple of ``value`` to the same multiple of ``wanted``; ``None`` where
    anything else is different.
    """
    if before.keys() != after.keys():
        return None
    axes = {}
    for name, shape in before.items():
        if shape == after[name]:
            continue
        if len(shape) != len(after[name]):
            return None
        changed = [axis for axis, size in enumerate(shape) if size != after[name][axis]]
        if len(changed) != 1:
            return None
        (axis,) = changed
        times, rest = divmod(shape[axis], value)
        if rest or after[name][axis] != times * wanted:
            return None
        axes[name] = axis
    return axes


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _expert_names(model: PreTrainedModel, *, biases_of_down: bool) -> set[str]:
    """Fused parameters of routed experts; biases of the down projection have no axis of neurons."""
    return {
        f"{path}.{name}"
        for path, module in find_experts(model).values()
        for name in part_names(module)
        if biases_of_down or name != "down_proj_bias"
    }


def _why(found: list[Any]) -> str:
    if not found:
        return "no field changes the experts and the router alone"
    return f"{' and '.join(change.field for change in found)} both do"
