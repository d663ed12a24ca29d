"""From a config and the headers of its weights to a ``ModelAnatomy``; no weight is read, no device memory taken.

Byte counts come from the checkpoint's headers where there are any, else from the meta model's
shapes. The cache's size comes from transformers' own cache classes: the model runs twice on the
meta device and what its cache holds is weighed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from conmoe_edge.checkpoint.format.dtypes import nbytes_of
from conmoe_edge.checkpoint.format.forms import Grid
from conmoe_edge.checkpoint.package.dense_names import own_shapes
from conmoe_edge.checkpoint.tensors.tensor_index import TensorEntry
from conmoe_edge.compat import TRANSFORMERS, cache_of
from conmoe_edge.errors import CheckpointError, UnsupportedModel
from conmoe_edge.model import bridge
from conmoe_edge.model.agreement import check_agreement
from conmoe_edge.model.anatomy import (
    DenseMatrix,
    ExpertPart,
    ExpertsAnatomy,
    KVLayer,
    LayerAnatomy,
    ModelAnatomy,
)
from conmoe_edge.model.blocked_attention import QUERIES, blocked
from conmoe_edge.model.config_json import WRONG
from conmoe_edge.model.experts import Decoder, find_decoder, part_names
from conmoe_edge.model.kv_rows import row_bytes
from conmoe_edge.model.layer_chain import requiring_chain
from conmoe_edge.model.linears import quantisable_weights
from conmoe_edge.model.meta_forward import meta_forward
from conmoe_edge.model.streaming import no_experts

_SHAPES_ONLY = "conmoe_shapes"


class TensorFacts(NamedTuple):
    """What a header says of one tensor: torch's name of the dtype, its bytes in the file and its shape. For a quantised
    one, dtype and shape are those of its expansion, and ``form`` says how it is stored (``mxfp4``, ``fp8``); ``grid``
    as of ``Logical``.
    """

    dtype: str
    nbytes: int
    shape: tuple[int, ...]
    form: str = "plain"
    grid: Grid | None = None


def facts_of(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorFacts]:
    """The facts of the tensors of a checkpoint on this disk."""
    shapes = own_shapes(tensors)
    return {name: TensorFacts(e.torch_name, e.nbytes, shapes[name]) for name, e in tensors.items()}


def _shapes_only(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(hidden)


def probe(
    config: PretrainedConfig,
    headers: Mapping[str, TensorFacts] | None = None,
    *,
    whole: bool = True,
) -> ModelAnatomy:
    """The anatomy of a model.

    Args:
        config: the model's config.
        headers: checkpoint tensor -> facts; without it the shapes of the meta model in ``config.dtype`` are used.
        whole: whether the headers are those of a whole model; those of a package are without its experts.

    Raises:
        UnsupportedModel: the model is dense, its experts cannot be reached, or its weights are quantised already.
        CheckpointError: config and headers do not describe the same model.
    """
    config = copy.deepcopy(config)  # the experts function is set on it below
    model, decoder = _built(config, headers)
    if headers is None:
        facts = {
            name: TensorFacts(
                _name(tensor.dtype), tensor.numel() * tensor.element_size(), tuple(tensor.shape)
            )
            for name, tensor in model.state_dict().items()
        }
        targets = {name: name for name in facts}
    else:
        facts = dict(headers)
        targets = _agreeing(model, decoder, facts, whole=whole)
    return _assemble(config, model, decoder, facts, targets)


def check_model(
    config: PretrainedConfig, headers: Mapping[str, TensorFacts], *, whole: bool = True
) -> None:
    """Build what ``config`` describes and compare it with the headers; arguments and errors as of ``probe``."""
    model, decoder = _built(copy.deepcopy(config), headers)
    _agreeing(model, decoder, headers, whole=whole)


def unplaced(
    config: PretrainedConfig, headers: Mapping[str, TensorFacts], names: Collection[str]
) -> frozenset[str]:
    """Those of the tensors ``names`` that what ``config`` describes has no place for; errors as of ``probe``."""
    model, _ = _built(copy.deepcopy(config), headers)
    return frozenset(names) - bridge.targets_of(model, names).keys()


def _built(
    config: PretrainedConfig, headers: Mapping[str, TensorFacts] | None
) -> tuple[PreTrainedModel, Decoder]:
    quantized = bridge.quantization_of(config)
    if quantized is not None:
        raise UnsupportedModel(
            f"This {config.model_type} checkpoint is quantised already ({quantized}).",
            "its config does not say how its tensors are read",
            "open it with open_model(), which reads the forms that are known",
        )
    count = None if headers is None else len(headers)
    model = bridge.build_meta(config, _main_dtype(config, headers), count)
    decoder = find_decoder(model)
    if decoder is None:
        raise no_experts(config)
    return model, decoder


def _agreeing(
    model: PreTrainedModel, decoder: Decoder, facts: Mapping[str, TensorFacts], *, whole: bool
) -> dict[str, str]:
    """Tensor -> its parameter, of a model that agrees with the headers."""
    targets = bridge.targets_of(model, facts)
    shapes = {name: one.shape for name, one in facts.items()}
    records = () if whole else fused_parameters(decoder)
    check_agreement(model, decoder.prefix, shapes, targets, records)
    return targets


def _assemble(
    config: PretrainedConfig,
    model: PreTrainedModel,
    decoder: Decoder,
    facts: Mapping[str, TensorFacts],
    targets: Mapping[str, str],
) -> ModelAnatomy:
    text = config.get_text_config()
    prefix, experts = decoder.prefix, decoder.experts
    layers: nn.ModuleList = model.get_submodule(prefix)  # type: ignore[assignment]
    fused = fused_parameters(decoder)
    dense = [0] * len(layers)
    outside = 0
    of_experts: dict[str, list[TensorFacts]] = {}
    for key, target in targets.items():
        if target in fused:
            of_experts.setdefault(target, []).append(facts[key])
        elif (layer := _layer_of(target, prefix)) is not None:
            dense[layer] += expanded_bytes(facts[key])
        else:
            outside += expanded_bytes(facts[key])
    top_k = top_k_of(text)
    anatomy = []
    for index in range(len(layers)):
        found = None
        if index in experts:
            path, module = experts[index]
            found = _experts_anatomy(path, module, of_experts, top_k)
        anatomy.append(LayerAnatomy(index, dense[index], found))
    return ModelAnatomy(
        model_type=config.model_type,
        architecture=type(model).__name__,
        dtype=_name(next(model.parameters()).dtype),
        hidden_size=count_in(text, "hidden_size"),
        vocab_size=count_in(text, "vocab_size"),
        max_context=longest_in(text) or 1 << 20,
        layers=tuple(anatomy),
        outside_bytes=outside,
        kv=_weigh_cache(model, decoder),
        dense_matrices=tuple(
            DenseMatrix(
                _layer_of(key, prefix),
                shape.rows,
                shape.columns,
                expanded_bytes(facts[key]),
                shape.in_rows,
                shape.looked_up,
                shape.at_an_end,
            )
            for key, shape in quantisable_weights(model, targets, decoder).items()
        ),
        source_form="+".join(sorted({one.form for one in facts.values()} - {"plain"})) or "plain",
        score_heads=0 if type(model)._supports_sdpa else count_in(text, "num_attention_heads"),
        score_rows=QUERIES if blocked(type(model)) else 0,
    )


def expanded_bytes(fact: TensorFacts) -> int:
    """Bytes of a tensor as a package stores it: what is quantised in the checkpoint is expanded there."""
    return fact.nbytes if fact.form == "plain" else nbytes_of(fact.dtype, fact.shape)


def fused_parameters(decoder: Decoder) -> frozenset[str]:
    """Paths of the parameters that hold the routed experts."""
    return frozenset(
        f"{path}.{name}" for path, module in decoder.experts.values() for name in part_names(module)
    )


def _layer_of(target: str, prefix: str) -> int | None:
    """The decoder layer of a parameter, ``None`` for one outside of them."""
    if not target.startswith(f"{prefix}."):
        return None
    return int(target[len(prefix) + 1 :].split(".", 1)[0])


def _experts_anatomy(
    path: str, module: nn.Module, stored: Mapping[str, Sequence[TensorFacts]], top_k: int
) -> ExpertsAnatomy:
    """``stored``: parameter -> the tensors of the checkpoint that it is made of."""
    parts = []
    count = 0
    for name in part_names(module):
        tensor: Tensor = getattr(module, name)
        count = tensor.shape[0]
        found = stored.get(f"{path}.{name}", ())
        dtype = found[-1].dtype if found else _name(tensor.dtype)
        shape = tuple(tensor.shape[1:])
        forms = {one.form for one in found} or {"plain"}
        if forms == {"plain"}:
            nbytes = tensor[0].numel() * getattr(torch, dtype).itemsize
        else:
            nbytes = sum(one.nbytes for one in found) // count
        # Experts of one layer in several forms have none in common.
        form = forms.pop() if len(forms) == 1 else "plain"
        grid = _grid(shape, found, bool(module.is_transposed))
        parts.append(ExpertPart(name, shape, dtype, nbytes, form, grid))
    return ExpertsAnatomy(path, count, min(top_k, count), tuple(parts), bool(module.is_transposed))


def _grid(shape: Sequence[int], found: Sequence[TensorFacts], transposed: bool) -> Grid | None:
    """What all tensors of a fused parameter have in common, whose experts have this shape."""
    grids = {(one.grid, one.shape[-1]) for one in found}
    if len(grids) != 1 or len(shape) != 2:
        return None
    ((grid, wide),) = grids
    rows, columns = reversed(shape) if transposed else shape
    return grid if grid and wide == columns and grid.takes(rows, columns) else None


def top_k_of(text: PretrainedConfig) -> int:
    for word in (
        "num_experts_per_tok",
        "moe_k",
        "moe_topk",
        "top_k_experts",
        "num_experts_per_token",
    ):
        value = getattr(text, word, None)
        if isinstance(value, (list, tuple)) and value and all(type(one) is int for one in value):
            value = max(value)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"config.json says {word} = {str(value)[:60]}.",
                "a router chooses at least one expert for each token",
                WRONG,
            )
        return value
    return 1


def count_in(config: PretrainedConfig, name: str) -> int:
    """A field that is a whole number above 0.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    value = getattr(config, name, None)
    if type(value) is int and value > 0:
        return value
    raise CheckpointError(
        f"config.json says {name} = {str(value)[:60]}.", "it is a whole number above 0", WRONG
    )


def longest_in(config: PretrainedConfig) -> int | None:
    """Tokens that a model goes to; ``None`` where its config names no limit.

    Raises:
        CheckpointError: the limit is no whole number above 0.
    """
    if not getattr(config, "max_position_embeddings", None):
        return None
    return count_in(config, "max_position_embeddings")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _main_dtype(config: PretrainedConfig, headers: Mapping[str, TensorFacts] | None) -> torch.dtype:
    """The dtype that most bytes of the checkpoint have; the config's where there are no headers."""
    weight: dict[str, int] = {}
    for fact in (headers or {}).values():
        weight[fact.dtype] = weight.get(fact.dtype, 0) + expanded_bytes(fact)
    floating = {
        name: count
        for name, count in weight.items()
        if getattr(torch, name, torch.int8).is_floating_point
    }
    if floating:
        return getattr(torch, max(sorted(floating), key=lambda name: floating[name]))
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _weigh_cache(model: PreTrainedModel, decoder: Decoder) -> tuple[KVLayer, ...]:
    """Bytes of the cache layers.

    Raises:
        UnsupportedModel: the model cannot run with what the config says, or gives back no known cache.
    """
    ALL_EXPERTS_FUNCTIONS.register(_SHAPES_ONLY, _shapes_only)
    for _, module in decoder.experts.values():
        module.config._experts_implementation = _SHAPES_ONLY  # type: ignore[union-attr]
    short, long = 12, 24
    hidden_size = count_in(model.config.get_text_config(), "hidden_size")
    with requiring_chain(model, decoder.prefix, hidden_size):
        before = _cache_after(model, short)
    after = _cache_after(model, long)
    found = []
    for one, two in zip(before.layers, after.layers, strict=True):
        window = getattr(two, "sliding_window", None) if getattr(two, "is_sliding", False) else None
        if window is not None:
            tokens = max(int(two.keys.shape[-2]), 1)
            per_token = _nbytes(two.keys, two.values) // tokens
            found.append(KVLayer(per_token, 0, int(window), _packed_bytes(after, two)))
            continue
        small, large = _nbytes(vars(one)), _nbytes(vars(two))
        per_token = (large - small) // (long - short)
        constant = max(0, large - per_token * long)
        packed = None
        if not constant:
            packed = _packed_bytes(after, two) if per_token else 0
        found.append(KVLayer(per_token, constant, packed=packed))
    loose = {name: value for name, value in vars(after).items() if name != "layers"}
    extra = _nbytes(loose)
    if extra and found:
        found[0] = replace(found[0], constant=found[0].constant + extra, packed=None)
    return tuple(found)


def _packed_bytes(cache: Any, layer: Any) -> int | None:
    """Bytes of a token of a cache layer in 8 bits; ``None`` where it has no such form."""
    if type(cache) is not DynamicCache or type(layer) not in (
        DynamicLayer,
        DynamicSlidingWindowLayer,
    ):
        return None
    parts = (layer.keys, layer.values)
    if not all(one.is_floating_point() and one.dtype != torch.float64 for one in parts):
        return None
    return sum(math.prod(one.shape[:-2]) * row_bytes(one.shape[-1]) for one in parts)


def _cache_after(model: PreTrainedModel, tokens: int) -> Any:
    cache = cache_of(meta_forward(model, tokens))
    if cache is None:
        raise UnsupportedModel(
            f"The memory that {type(model).__name__} needs cannot be counted.",
            f"it gives back no key-value cache under a known name with transformers {version('transformers')}",
            f"Install a release that was tested: pip install 'transformers{TRANSFORMERS}'",
        )
    return cache


def _nbytes(*values: Any) -> int:
    """Bytes of all tensors of more than one element in nested containers."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size() if value.numel() > 1 else 0
        elif isinstance(value, Mapping):
            total += _nbytes(*value.values())
        elif isinstance(value, (list, tuple)):
            total += _nbytes(*value)
    return total
