"""A model's config and the tensors of a plain checkpoint of it, whatever form its own checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from conmoe_edge.checkpoint.fs.contained import is_there
from conmoe_edge.checkpoint.gguf.opened import GgufModel
from conmoe_edge.checkpoint.quantised.scheme import Scheme, find_scheme
from conmoe_edge.checkpoint.quantised.stored import Peek, Stored
from conmoe_edge.checkpoint.quantised.zero_biases import biases_beside, without_biases
from conmoe_edge.checkpoint.tensors.tensor_index import CONFIG_FILE
from conmoe_edge.model.bridge import check_known, read_config, without_quantization
from conmoe_edge.model.config_json import read_settings, says
from conmoe_edge.model.other_parts import NOTHING, OtherParts, other_parts_of
from conmoe_edge.model.probe import TensorFacts, unplaced
from conmoe_edge.model.size_bounds import SizeBounds

DECLARATIONS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where tools say how they quantised a model, when config.json does not."""
_FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Attributes:
    config: of the plain model; it declares no quantisation.
    facts: of the tensors of a plain checkpoint.
    scheme: how they are made from the tensors of the file.
    beside: what of them belongs to parts for pictures and sound.
    """

    config: PretrainedConfig
    facts: Mapping[str, TensorFacts]
    scheme: Scheme
    beside: OtherParts


def read_source(
    folder: Path, stored: Mapping[str, Stored], peek: Peek | None = None
) -> SourceFacts:
    """Read what the small files in ``folder`` say of a model with the tensors ``stored``.

    ``stored`` and ``peek`` are as of ``find_scheme``.

    Raises:
        CheckpointError: a file is damaged, or tensors do not belong together.
        UnsupportedModel: the model, or the way it is quantised, is of a kind that is not read.
    """
    settings = read_settings(folder, CONFIG_FILE)
    check_known(folder, settings)  # before the weights: of an unknown model no other version helps
    dtype = _float_dtype(settings, stored)
    scheme = find_scheme(stored, declared_in(folder, settings), dtype, peek)
    facts = _facts_of(scheme)
    bounds = SizeBounds.of({name: one.shape for name, one in facts.items()})
    config = without_quantization(read_config(folder, bounds, settings))
    if biases := biases_beside(scheme):
        scheme = without_biases(scheme, unplaced(config, facts, biases))
        facts = _facts_of(scheme)
    return SourceFacts(config, facts, scheme, other_parts_of(config, facts))


def read_gguf(gguf: GgufModel) -> SourceFacts:
    """The same of a GGUF model; its ``scheme`` is empty.

    Raises:
        CheckpointError: the config that its metadata gives cannot be.
    """
    facts = {
        name: TensorFacts(one.dtype, one.nbytes, one.shape, one.form)
        for name, one in gguf.tensors.items()
    }
    bounds = SizeBounds.of({name: one.shape for name, one in facts.items()})
    return SourceFacts(read_config(gguf.folder, bounds), facts, Scheme({}), NOTHING)


def _facts_of(scheme: Scheme) -> dict[str, TensorFacts]:
    return {
        name: TensorFacts(one.dtype, one.nbytes, one.shape, one.form, one.grid)
        for name, one in scheme.tensors.items()
    }


def declared_in(folder: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a model says that it is quantised: config.json before the tools' own files; empty where none says so."""
    text = settings.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    own = settings.get("quantization_config") or nested
    if own:
        if not isinstance(own, dict):
            raise says(folder / CONFIG_FILE, "quantization_config", own, "it is an object")
        return own
    for name in DECLARATIONS:
        if is_there(folder, name):
            found = read_settings(folder, name)
            inner = found.get("quantization")  # as modelopt writes it
            if isinstance(inner, dict):
                return {"quant_method": "modelopt", **inner}
            return {"quant_method": name, **found}
    return {}


def _float_dtype(settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> str:
    """The format that the config names, else the one that most plain tensors have."""
    text = settings.get("text_config")
    for one in (settings, text if isinstance(text, dict) else {}):
        word = str(one.get("dtype") or one.get("torch_dtype") or "").removeprefix("torch.")
        if word in _FLOATS:
            return word
    counts = {name: sum(one.dtype == name for one in stored.values()) for name in _FLOATS}
    return max(_FLOATS, key=lambda name: counts[name])
