"""Whether a model's decoder layers are a chain that can be streamed: one [B, T, H] tensor goes from layer to layer.

Streaming runs a layer over all sequences before the next one is loaded, and keeps one tensor for each sequence in
between. A model whose layers hand each other more (the choices of a sparse attention, several streams of hidden
states), change it on the way, or run twice, would be cut short without an error. One meta forward shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.config_json import ANOTHER_MODEL


@contextmanager
def requiring_chain(model: PreTrainedModel, prefix: str, hidden_size: int) -> Iterator[None]:
    """Watch the forward that runs within it.

    Args:
        model: on the meta device.
        prefix: path of its decoder layers.
        hidden_size: H.

    Raises:
        UnsupportedModel: on leaving, where the decoder layers are no chain.
    """
    layers: nn.ModuleList = model.get_submodule(prefix)  # type: ignore[assignment]
    faults: list[str] = []
    order: list[int] = []
    last: list[Any] = [None]
    shared: dict[int, dict[str, int]] = {}

    def before(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if order and given is not last[0] and not isinstance(last[0], tuple):
                faults.append(f"what decoder layer {index} gets is not what the layer before gave")
            shared[index] = _sizes(kwargs)
            order.append(index)

        return hook

    def after(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
            last[0] = out
            if isinstance(out, tuple):
                faults.append(f"decoder layer {index} gives {len(out)} values")
            elif not isinstance(out, Tensor) or out.dim() != 3 or out.shape[-1] != hidden_size:
                shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
                faults.append(f"decoder layer {index} gives {shape}")
            if changed := [n for n, size in _sizes(kwargs).items() if shared[index].get(n) != size]:
                faults.append(f"decoder layer {index} leaves something in {changed[0]}")

        return hook

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(after(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not faults and order != list(range(len(layers))):
        faults.append(f"{len(layers)} decoder layers run {len(order)} times")
    if faults:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be consolidated layer by layer.",
            f"more than one tensor [batch, tokens, hidden] goes from layer to layer: {faults[0]}",
            ANOTHER_MODEL,
        )


def _sizes(kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Lengths of the containers that a layer is given and may write into."""
    return {name: len(one) for name, one in kwargs.items() if type(one) in (dict, list)}
