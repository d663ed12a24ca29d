"""The maths of routed experts, for every architecture: through the experts module's own attributes.

transformers v5 keeps the routed experts of a layer in one module with fused 3-D weights and marks
how they are laid out (``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``) and
gated (``_apply_gate``, ``act_fn``). Everything here reads those, so there is no code for single
models. Weights come in as ``parts``: a mapping from the module's parameter names (``gate_up_proj``,
``down_proj``, ``gate_up_proj_bias``, ...) to the tensor of *one* expert, without the expert axis.

Nothing here allocates more than the activations of the rows it is given (and one expert in ``compute_dtype``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def is_experts_module(module: nn.Module) -> bool:
    """True for a module whose class runs through transformers' registry of experts functions."""
    return all(hasattr(module, mark) for mark in _MARKS)


def part_names(module: nn.Module) -> tuple[str, ...]:
    """The fused parameters of an experts module in record order: projections in flow order, then their biases."""
    own = dict(module.named_parameters(recurse=False))
    names = [name for name in _PROJECTIONS if name in own]
    names += [f"{name}_bias" for name in _PROJECTIONS if f"{name}_bias" in own]
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Where a model keeps its decoder layers.

    Attributes:
        prefix: path of the ``ModuleList`` that holds them (``model.layers``).
        experts: decoder layer -> (module path, experts module), layers ascending.
    """

    prefix: str
    experts: Mapping[int, tuple[str, nn.Module]]


def find_decoder(model: nn.Module) -> Decoder | None:
    """The decoder of a model with routed experts; ``None`` for one without.

    Its layers are the ``ModuleList`` that holds the first experts module found. Experts elsewhere (heads for
    multi-token prediction, say) belong to no decoder layer and are left out.
    """
    modules = [(path, one) for path, one in model.named_modules() if is_experts_module(one)]
    for path, _ in modules:
        pieces = path.split(".")
        for end, piece in enumerate(pieces):
            prefix = ".".join(pieces[:end])
            if piece.isdigit() and isinstance(model.get_submodule(prefix), nn.ModuleList):
                layers = {
                    int(other[len(prefix) + 1 :].split(".", 1)[0]): (other, module)
                    for other, module in modules
                    if other.startswith(f"{prefix}.")
                }
                return Decoder(prefix, dict(sorted(layers.items())))
    return None


def find_experts(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """``Decoder.experts`` of a model; empty for one without."""
    found = find_decoder(model)
    return {} if found is None else dict(found.experts)


Project = Callable[[str, Tensor], Tensor]
"""A projection of an expert by its parameter name, bias included: [..., in] -> [..., out]."""


def through_expert(module: nn.Module, hidden: Tensor, project: Project) -> Tensor:
    """The walk through an expert, whatever does its products: up, gate, down, norm.

    Args:
        module: the experts module; only its attributes are read, its weights may be absent.
        hidden: [..., H].
        project: computes a projection.

    Returns:
        [..., H], without the routing weight.
    """
    out = project("down_proj", _up_and_gate(module, hidden, project))
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)  # type: ignore[operator]
    return out


def expert_forward(
    module: nn.Module,
    hidden: Tensor,
    parts: Mapping[str, Tensor],
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """One expert applied to its tokens, by plain products.

    Args:
        module: the experts module; only its attributes are read, its weights may be absent.
        hidden: [n, H].
        parts: one expert's tensors by parameter name.
        compute_dtype: dtype of the matrix products; that of ``hidden`` by default. Where the weights have another
            one they are converted, which costs one copy of this expert.

    Returns:
        [n, H] in ``compute_dtype``, without the routing weight.
    """
    dtype = compute_dtype or hidden.dtype
    return through_expert(module, hidden.to(dtype), plain_products(module, parts, dtype))


def inner_activations(
    module: nn.Module,
    hidden: Tensor,
    parts: Mapping[str, Tensor],
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """What an expert's down projection gets: [n, H] -> [n, I]; arguments as of ``expert_forward``."""
    dtype = compute_dtype or hidden.dtype
    return _up_and_gate(module, hidden.to(dtype), plain_products(module, parts, dtype))


def plain_products(module: nn.Module, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Project:
    """The projections of one expert as products in ``dtype``; arguments as of ``expert_forward``."""

    def project(name: str, x: Tensor) -> Tensor:
        weight, bias = parts[name].to(dtype), parts.get(f"{name}_bias")
        # [n, in] @ [in, out], or the same with the weight stored as [out, in]
        y = x @ weight if module.is_transposed else nn.functional.linear(x, weight)
        return y if bias is None else y + bias.to(dtype)

    return project


def _up_and_gate(module: nn.Module, hidden: Tensor, project: Project) -> Tensor:
    """[..., H] -> [..., I]."""
    inner = project("gate_up_proj" if module.has_gate else "up_proj", hidden)
    return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class Routes:
    """Which prototype sees which tokens, duplicates already added up.

    ``prototypes`` are the distinct prototype numbers in ascending order; prototype ``prototypes[i]`` takes the tokens
    ``rows[starts[i]:starts[i + 1]]`` (ascending) with the weights ``weights[starts[i]:starts[i + 1]]`` (fp32).
    """

    prototypes: list[int]
    starts: list[int]
    rows: Tensor  # [N] int64
    weights: Tensor  # [N] fp32


def merge_routes(
    index: Tensor,
    weights: Tensor,
    slot_to_prototype: Tensor,
    scales: Tensor | None = None,
) -> Routes:
    """Router slots to prototypes; weights that meet on one prototype are added once, in fp32 (ConMoE, section 3.3).

    alpha_p(t) = sum of g_i(t) * s_i over the chosen slots i with m(i) = p.

    Args:
        index: [T, K] router slots; values outside ``[0, E)`` are skip marks and carry nothing.
        weights: [T, K] gates as the model's router gave them; nothing is renormalised here.
        slot_to_prototype: [E] int64 prototype numbers, -1 for a slot without prototype.
        scales: [E] fp32 factor per slot, or ``None`` for all one.

    The order of every sum is fixed by the order of a token's slots, so the result does not depend on memory or device.
    """
    experts = slot_to_prototype.numel()
    valid = (index >= 0) & (index < experts)
    slot = index.clamp(0, experts - 1)
    proto = torch.where(valid, slot_to_prototype[slot], -1)  # [T, K]
    alpha = weights.float()
    if scales is not None:
        alpha = alpha * scales[slot]
    alpha = torch.where(proto >= 0, alpha, 0.0)
    same = proto.unsqueeze(2) == proto.unsqueeze(1)  # [T, K, K]
    summed = (same * alpha.unsqueeze(1)).sum(-1)  # [T, K]
    first = ~torch.tril(same, diagonal=-1).any(-1) & (
        proto >= 0
    )  # the slot that stands for all its equals
    rows, cols = first.nonzero(as_tuple=True)  # tokens ascending
    chosen = proto[rows, cols]
    order = torch.argsort(chosen, stable=True)
    present, counts = torch.unique_consecutive(chosen[order], return_counts=True)
    starts = [0, *torch.cumsum(counts, 0).tolist()]
    return Routes(present.tolist(), starts, rows[order], summed[rows, cols][order])


def sum_dtype(hidden: Tensor) -> torch.dtype:
    """Sums over prototypes are fp32, or wider where the activations are."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def add_constants(
    total: Tensor, index: Tensor, weights: Tensor, constants: Tensor, constant_of: Tensor
) -> None:
    """total(t) += sum over slots i of g_i(t) * c_i, slot by slot."""
    slots = constant_of.numel()
    inside = (index >= 0) & (index < slots)
    row = torch.where(inside, constant_of[index.clamp(0, slots - 1)], -1)  # [T, K]
    gate = torch.where(row >= 0, weights.float(), 0.0)  # [T, K]
    for k in range(row.shape[1]):
        total += constants[row[:, k].clamp(min=0)] * gate[:, k].unsqueeze(1)
