"""One new token at a time through a model on a CPU: in as few calls as its layers allow.

``install`` is the only way in. Everything that it puts into a model looks at what it is given; all but single tokens
goes transformers' way. Which classes are served stands in ``supported.py``; ``FastPathReport`` says what a model has
got, and why not more.

Memory: what the modules say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from conmoe_edge.compat import Arguments, cache_of
from conmoe_edge.model.checked_attention import check_attention
from conmoe_edge.offload.compute.torch_backend import Machine
from conmoe_edge.offload.fastpath.attention import FusedAttention, fused_attention
from conmoe_edge.offload.fastpath.attention_function import suit_attention
from conmoe_edge.offload.fastpath.decoder_layer import (
    Checked,
    FusedLayer,
    Meeting,
    fused_layer,
)
from conmoe_edge.offload.fastpath.fused_router import FusedRouter, fused_router
from conmoe_edge.offload.fastpath.kv_cache import StandsForOthers, grow_in_steps
from conmoe_edge.offload.fastpath.packed_cache import pack_in_steps
from conmoe_edge.offload.fastpath.report import FastPathReport, LayerPath, Served, warn_once
from conmoe_edge.offload.fastpath.rms_norm import fused_norm
from conmoe_edge.offload.fastpath.single_step import SingleStep, why_around
from conmoe_edge.offload.fastpath.supported import Refusal, forget_digests
from conmoe_edge.offload.fastpath.together import Together
from conmoe_edge.offload.kernels.cpu.bindings import operator, why_not


def install(
    model: PreTrainedModel, machine: Machine, context: int, kv_precision: str = "source"
) -> FastPathReport:
    """Let ``model`` take single tokens through the operator wherever it can, and let its caches grow in steps up to
    ``context`` tokens, in ``kv_precision`` (``plan/kv_precision.py``).

    Its weights are where they stay, and its linear layers are ``FusedLinear``. The order below is the only one: an
    attention wants fused norms, and a layer a fused attention and a fused router.

    Raises:
        UnsupportedModel: the model's ``forward`` takes no cache under a known name.
    """
    served, checked, refused, meeting = Served(), Checked(), _Refused(), Meeting()
    engine = operator() if machine.device == "cpu" else None
    forget_digests()
    if engine is not None:
        for path, module in list(model.named_modules()):
            norm = refused.unless(module, fused_norm(module, engine))
            if norm is not None:
                model.set_submodule(path, norm, strict=True)
    reason = _why_not(model, machine)
    suited = engine is not None and not reason and suit_attention(model, machine)
    if not suited:
        check_attention(model)
    if engine is not None and not reason:
        for make in (
            lambda module: fused_attention(module, engine, served),
            lambda module: fused_router(module, engine),
            lambda module: fused_layer(module, engine, checked, served, meeting),
        ):
            _put_in_front(model, make, refused)
    layers = [one for one in map(_forward_of, model.modules()) if isinstance(one, FusedLayer)]
    steps = _Steps(Arguments.of(model), context, layers, served, meeting, kv_precision)
    model.register_forward_pre_hook(steps.before, with_kwargs=True)
    if layers:
        model.register_forward_hook(steps.behind, always_call=True)
    for text in refused.changed:
        warn_once(f"{text}: single tokens take transformers' steps there, which are slower")
    windows = _windows(model)
    paths = [_path(i, one, refused, i in windows) for i, one in enumerate(_decoder_layers(model))]
    together, apart = None, reason or _why_apart(paths)
    around = apart
    if engine is not None and not apart:
        ordered = [_forward_of(one) for one in _decoder_layers(model)]
        together = Together(model, ordered, meeting, served, engine)
        around = why_around(model)
        if not around:
            steps.single = SingleStep(model, ordered, windows, meeting)
            steps.single.put_in_front()
    return FastPathReport(tuple(paths), reason, apart, around, served, together)


class _Steps:
    """The hooks around the model's ``forward``. What can be looked at before a token is looked at here for all layers:
    between two layers' weights every line of it is cold, and costs ten times as much.
    """

    def __init__(
        self,
        arguments: Arguments,
        context: int,
        layers: Sequence[FusedLayer],
        served: Served,
        meeting: Meeting,
        kv_precision: str,
    ) -> None:
        """``arguments`` of the model; ``layers`` in any order, which share the ``meeting``."""
        self._arguments = arguments
        self._context, self._layers, self._served = context, layers, served
        self._meeting = meeting
        self._packed = kv_precision != "source"
        self.single: SingleStep | None = None

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """In front of it: the cache first, as the layers look at its buffers. In 8 bits a forward without a cache gets
        one, so that attention sees the same keys and values in every forward.
        """
        named = self._arguments.named(args, kwargs)
        held, ids = cache_of(named), named.get("input_ids")
        given = None
        if not self._packed:
            grow_in_steps(held, self._context)
        elif not isinstance(held, StandsForOthers):
            if held is None:
                held = DynamicCache(config=module.config)
                given = self._arguments.with_cache(args, kwargs, held)
            pack_in_steps(held, self._context)
        single = isinstance(ids, Tensor) and ids.shape == (1, 1)
        if self._meeting.over:
            return given
        if self._meeting.entries is None:
            self._served.tokens += single
        if single and self.single is not None and self.single.prepare(held):
            return given
        for layer in self._layers:
            layer.prepare(held if single else None)
        return given

    def behind(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind it, called with nothing where it failed: then the token is in no layer's cache."""
        for layer in self._layers:
            layer.finish(output is not None)


class _Refused:
    """Why modules are left to transformers."""

    def __init__(self) -> None:
        self._by_module: dict[nn.Module, str] = {}
        self.changed: dict[str, None] = {}

    def unless(self, module: nn.Module, made: Any) -> Any:
        """``made``, or ``None`` where it is a refusal."""
        if not isinstance(made, Refusal):
            return made
        if made.reason:
            self._by_module.setdefault(module, made.reason)
        if made.changed:
            self.changed[made.reason] = None
        return None

    def reason(self, module: nn.Module) -> str:
        """The first one of a module."""
        return self._by_module.get(module, "")


def _put_in_front(model: nn.Module, make: Callable[[nn.Module], Any], refused: _Refused) -> None:
    for module in model.modules():
        made = refused.unless(module, make(module))
        if made is not None:
            module.forward = made


def _forward_of(module: nn.Module) -> Any:
    return vars(module).get("forward")


def _why_not(model: PreTrainedModel, machine: Machine) -> str:
    """Why no layer of this model can have the fast path on this machine; empty where one may."""
    if machine.device != "cpu":
        return f"not on {machine.device}: it is for CPUs"
    if operator() is None:
        return f"torch's own kernels: {why_not()}"
    if model.dtype != torch.bfloat16:
        return f"transformers' own steps: the model computes in {str(model.dtype).removeprefix('torch.')}"
    return ""


def _decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    return getattr(model.get_decoder(), "layers", ())


def _path(index: int, layer: nn.Module, refused: _Refused, window: bool) -> LayerPath:
    """What decoder layer ``layer`` has got, whose cache has a ``window`` or not."""
    parts = list(layer.modules())
    router = any(isinstance(_forward_of(one), FusedRouter) for one in parts)
    attention = next(
        (_forward_of(one) for one in parts if isinstance(_forward_of(one), FusedAttention)), None
    )
    if attention is None:
        names = ("Attention", "Net", "Conv")  # of what stands in its place; only for the reason
        mixers = [one for one in layer.children() if type(one).__name__.endswith(names)]
        reason = next(map(refused.reason, mixers), "") or refused.reason(layer)
        return LayerPath(index, "none", router, reason)
    if window and not attention.windows:
        return LayerPath(index, "none", router, "its cache has a window")
    fused = _forward_of(layer)
    if not isinstance(fused, FusedLayer):
        return LayerPath(index, "attention", router, refused.reason(layer))
    reason = fused.why_not_one_call()
    return LayerPath(index, "block" if reason else "layer", router, reason)


def _why_apart(paths: Sequence[LayerPath]) -> str:
    """Why several answers do not share steps; empty where they do."""
    others = [one for one in paths if one.live != "layer"]
    if not paths:
        return "it has no decoder layers"
    return f"layer {others[0].index} is not one call: {others[0].reason}" if others else ""


def _windows(model: PreTrainedModel) -> set[int]:
    """The layers whose part of a cache has a window."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return {i for i, one in enumerate(layers) if isinstance(one, DynamicSlidingWindowLayer)}
