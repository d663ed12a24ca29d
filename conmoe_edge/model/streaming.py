"""A model that is never whole in memory: one decoder layer at a time, for every architecture.

``StreamedModel`` holds the causal LM on the meta device. What is outside the decoder layers is
loaded once; a decoder layer is loaded, run over all the sequences, and dropped. Which arguments a
layer gets (rotary embeddings, the mask of its attention type, ...) is found out by running the
model's own forward with every layer replaced by a stub that writes its arguments down, so no
model's forward is transcribed here.

Peak memory of the device: what is outside the layers, while it is loaded; one decoder layer, and
one of its fused parameters a second time while it is put together; the activations of one batch.
Hidden states between layers belong to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from conmoe_edge.compat import cache_argument, cache_of
from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.memory.heap import trim_heap
from conmoe_edge.model import bridge
from conmoe_edge.model.agreement import check_places
from conmoe_edge.model.checked_attention import check_attention
from conmoe_edge.model.config_json import ANOTHER_MODEL
from conmoe_edge.model.experts import find_decoder, part_names
from conmoe_edge.model.router import Router, find_routers

_EXPERTS = re.compile(r"(^|_)(n|num)_(\w+_)?experts$")
_NOT_ROUTED = re.compile(r"shared|null|zero")

ReadTensors = Callable[[Sequence[str]], Mapping[str, Any]]


class _Captured(Exception):
    """Leaves the model's forward once the last layer's arguments are known."""


@dataclass(slots=True)
class Batch:
    """Sequences that run together and the arguments that each decoder layer gets for them.

    ``input_ids`` [B, T]; ``attention_mask`` [B, T] with 0 at padding, or ``None``; ``calls[i]`` are
    the positional and keyword arguments of decoder layer i without the hidden states. With
    ``use_cache`` the model's own key-value cache is in these arguments and fills as the layers run;
    it is ``cache`` then, and the batch that continues these sequences is given it. It stays ``None``
    for a model that hands its layers none. A ``cache`` that is given is the one that layers get.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    use_cache: bool = False
    cache: Any = None


class StreamedModel:
    """A causal LM whose decoder layers come and go.

    Args:
        config: the model's config.
        keys: names of all tensors in the checkpoint.
        read: names -> lazily read tensors; called once a layer.
        dtype: dtype of everything but the routed experts, and of the activations.
        experts_dtype: dtype in which the routed experts are held (the checkpoint's, to save memory).
        device: where the layer runs.
        experts_implementation: name of the registered experts function, or ``eager``.

    Raises:
        UnsupportedModel: the model has no routed experts that run through transformers' registry.
        CheckpointError: a tensor of the decoder has no place in the model.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        keys: Sequence[str],
        read: ReadTensors,
        *,
        dtype: torch.dtype,
        experts_dtype: torch.dtype,
        device: torch.device,
        experts_implementation: str = "eager",
    ) -> None:
        self.model = bridge.build_meta(config, dtype, len(keys))
        check_attention(self.model)
        self.device = device
        self.dtype = dtype
        self._read = read
        decoder = find_decoder(self.model)
        if decoder is None:
            raise no_experts(config)
        self.prefix = decoder.prefix
        self.layers: nn.ModuleList = self.model.get_submodule(decoder.prefix)  # type: ignore[assignment]
        self.experts = decoder.experts
        for _, module in self.experts.values():
            for name in part_names(module):
                old = getattr(module, name)
                setattr(
                    module,
                    name,
                    nn.Parameter(torch.empty_like(old, dtype=experts_dtype), requires_grad=False),
                )
        self.set_experts_implementation(experts_implementation)
        self._routers: dict[int, Router] | None = None
        self._own_forwards = [layer.forward for layer in self.layers]
        self._keys_of: dict[int | None, list[str]] = {
            None: [],
            **{i: [] for i in range(len(self.layers))},
        }
        targets = bridge.targets_of(self.model, keys)
        check_places(self.model, self.prefix, keys, targets)
        outside: dict[str, list[str]] = {}
        for key, target in targets.items():
            layer = self._layer_of(target)
            self._keys_of[layer].append(key)
            if layer is None:
                outside.setdefault(target, []).append(key)
        self._outside = list(outside.values())
        expert_targets = {
            f"{path}.{name}"
            for path, module in self.experts.values()
            for name in part_names(module)
        }
        self._fused = {key: target for key, target in targets.items() if target in expert_targets}
        self.expert_keys = frozenset(self._fused)

    def _layer_of(self, target: str) -> int | None:
        if not target.startswith(f"{self.prefix}."):
            return None
        piece = target[len(self.prefix) + 1 :].split(".", 1)[0]
        return int(piece) if piece.isdigit() else None

    def set_experts_implementation(self, name: str) -> None:
        """Choose the registered experts function for every layer."""
        for _, module in self.experts.values():
            config: Any = module.config
            config._experts_implementation = name

    def layer_keys(self, index: int) -> list[str]:
        """Checkpoint tensors of one decoder layer, sorted."""
        return self._keys_of[index]

    def routers(self) -> dict[int, Router]:
        """Decoder layer -> its router. The first call comes while nothing is loaded.

        Raises:
            UnsupportedModel: what chooses the slots of a layer cannot be found.
        """
        if self._routers is None:
            self._routers = find_routers(self.model)
        return self._routers

    @property
    def outside_keys(self) -> list[str]:
        """Checkpoint tensors outside the decoder layers, sorted."""
        return self._keys_of[None]

    def load_outside(self) -> None:
        """Load what is outside the decoder layers: embeddings, final norm, head."""
        trim_heap()  # what was computed before has left pieces
        for keys in self._outside:  # a parameter at a time: each is there twice while it is loaded
            bridge.load_subset(self.model, self._read(keys), self.device)
        bridge.tie(self.model)
        bridge.fill_buffers(self.model, "", self.device)
        for path, module in self.model.named_modules():
            inside = path == self.prefix or path.startswith(f"{self.prefix}.")
            if not inside and not any(True for _ in module.children()):
                bridge.check_loaded(module, path)

    def drop_outside(self) -> None:
        """Give back what ``load_outside`` loaded; between prologue and epilogue it is not needed."""
        nn.Module.to(self.model, "meta")

    @contextmanager
    def layer(self, index: int, *, with_experts: bool = True) -> Iterator[nn.Module]:
        """Decoder layer ``index`` with its weights; they are dropped on leaving.

        With ``with_experts=False`` the routed experts stay on the meta device: the experts function brings its own.
        """
        path = f"{self.prefix}.{index}"
        for keys in self._portions(index, with_experts):
            bridge.load_subset(self.model, self._read(keys), self.device)
        layer = self.layers[index]
        bridge.fill_buffers(self.model, path, self.device)
        absent = (
            () if with_experts or index not in self.experts else part_names(self.experts[index][1])
        )
        bridge.check_loaded(layer, path, absent)
        try:
            yield layer
        finally:
            layer.to("meta")

    def _portions(self, index: int, with_experts: bool) -> list[list[str]]:
        """The layer's tensors in groups that are loaded one after another: what is no routed
        expert, then one fused parameter at a time, since fusing needs its tensors twice.
        """
        groups: dict[str, list[str]] = {"": []}
        for key in self._keys_of[index]:
            target = self._fused.get(key, "")
            if with_experts or not target:
                groups.setdefault(target, []).append(key)
        return [keys for keys in groups.values() if keys]

    def prologue(self, batch: Batch) -> Tensor:
        """Embed the batch and write down every layer's arguments into ``batch.calls``.

        Returns:
            [B, T, H]: the input of decoder layer 0.
        """
        first: list[Tensor] = []
        batch.calls.clear()

        def stub(index: int) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if index == 0:
                    first.append(hidden_states)
                batch.calls.append((args, kwargs))
                if index == len(self.layers) - 1:
                    raise _Captured
                return hidden_states

            return forward

        with suppress(_Captured):
            self._run(batch, stub, use_cache=batch.use_cache, cache=batch.cache)
        if batch.use_cache:
            batch.cache = cache_of(batch.calls[0][1])
        return first[0]

    def epilogue(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Final norm, head and whatever else the model does after its layers.

        Args:
            hidden: [B, T, H], the output of the last decoder layer.

        Returns:
            [B, T, V] logits.
        """
        last = len(self.layers) - 1

        def stub(index: int) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return hidden if index == last else hidden_states

            return forward

        return self._run(batch, stub).logits

    def run_layer(self, index: int, hidden: Tensor, batch: Batch) -> Tensor:
        """Decoder layer ``index`` (loaded) over one batch. hidden: [B, T, H] -> [B, T, H]."""
        args, kwargs = batch.calls[index]
        with torch.no_grad():
            out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _run(
        self,
        batch: Batch,
        stub: Callable[[int], Callable[..., Tensor]],
        *,
        use_cache: bool = False,
        cache: Any = None,
    ) -> Any:
        for index, layer in enumerate(self.layers):
            layer.forward = stub(index)  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                return self.model(
                    input_ids=batch.input_ids.to(self.device),
                    attention_mask=None
                    if batch.attention_mask is None
                    else batch.attention_mask.to(self.device),
                    use_cache=use_cache,
                    **cache_argument(self.model, cache),
                )
        finally:
            for layer, forward in zip(self.layers, self._own_forwards, strict=True):
                layer.forward = forward  # type: ignore[method-assign]


def no_experts(config: PretrainedConfig) -> UnsupportedModel:
    """The error for a model without routed experts that can be reached."""
    if counts := list(_expert_counts(config.to_dict())):
        return UnsupportedModel(
            f"{config.model_type} cannot be consolidated.",
            f"its config names {max(counts)} experts, and none of its decoder layers runs experts through "
            "transformers' registry of experts functions",
            ANOTHER_MODEL,
        )
    return UnsupportedModel(
        f"{config.model_type} is a dense model.",
        "it has no routed experts, so there is nothing to consolidate",
        ANOTHER_MODEL,
    )


def _expert_counts(settings: Mapping[str, Any]) -> Iterator[int]:
    """Numbers of routed experts above one, under whatever name and in whichever part (DBRX: ``ffn_config``)."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif _EXPERTS.search(str(name)) and not _NOT_ROUTED.search(str(name)):
            several = value if isinstance(value, list | tuple) else (value,)
            yield from (one for one in several if type(one) is int and one > 1)
