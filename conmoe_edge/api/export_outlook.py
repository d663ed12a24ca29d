"""What ``export`` will make of the package that a plan is for, known before the fit.

A plain checkpoint has an expert for every router slot and nothing that adds a constant, unless experts have a bias at
their output. So some settings can be run here and in vLLM, and nowhere else. ``plan`` and ``fit`` say that first; what
was asked for another engine that can never come of it is refused. Memory: with ``--for`` two models on the meta device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.plan.serving import PLAIN

if TYPE_CHECKING:
    from conmoe_edge.compress.methods.interface import Method
    from conmoe_edge.model.anatomy import ModelAnatomy
    from conmoe_edge.plan.plan import Plan

_OUTPUT_BIAS = "down_proj_bias"
_SHRINKS = "--for hf or --for gguf makes one that exports, with every expert, narrower"


def export_outlook(
    config: Any, anatomy: ModelAnatomy, plan: Plan, method: Method, engine: str | None
) -> str:
    """One sentence on what cannot be had of the package in other engines; empty where there is nothing to say.

    Args:
        config: the model's.
        anatomy: the model's.
        plan: what will be done.
        method: how.
        engine: what the package is for, where it is not this project.

    Raises:
        UnsupportedModel: a GGUF file is wanted, and llama.cpp would compute this model otherwise, or there is no writer
            for its family.
    """
    if engine == "gguf":
        _check_gguf(config)
    if plan.unchanged:
        return ""
    if engine in PLAIN:
        return _of_one_width(config, anatomy, plan)
    if engine is not None:
        return ""
    chosen = plan.chosen
    if not chosen.rate and not chosen.bits:
        return f"a plain checkpoint of it is as large as the model; {_SHRINKS}"
    if method.constants and not _has_output_bias(anatomy):
        return (
            "not to transformers, llama.cpp or Ollama: router slots add constants, which their files cannot hold; "
            f"{_SHRINKS}"
        )
    if method.reroutes:
        return ""
    return f"a plain checkpoint of it is as large as the model; {_SHRINKS}"


def _check_gguf(config: Any) -> None:
    from conmoe_edge.export.llama.architectures import architecture_of

    try:
        architecture_of(config)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            error.what,
            error.why,
            "--for hf, whose export transformers, vLLM and SGLang read",
        ) from error


def _has_output_bias(anatomy: ModelAnatomy) -> bool:
    """Whether the experts of every layer have a bias that holds a constant."""
    return all(
        any(part.name == _OUTPUT_BIAS for part in layer.experts.parts)
        for layer in anatomy.moe_layers
        if layer.experts is not None
    )


def _of_one_width(config: Any, anatomy: ModelAnatomy, plan: Plan) -> str:
    from conmoe_edge.export.config_fields import width_field

    whole = next(layer.experts.width for layer in anatomy.moe_layers if layer.experts)
    width = plan.chosen.width
    if width == whole or width_field(config, whole, width) is not None:
        return ""
    return (
        f"its experts are written with all {whole} neurons, {whole - width} of them zero, so it saves no memory: no "
        "field of this config gives the neurons of routed experts alone"
    )
