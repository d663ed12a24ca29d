"""A single token through a model whose decoder layers are one call each, without the model's own steps around them.

What transformers has around the layers (two ``forward`` functions with their decorators, a mask that hides nothing,
keyword arguments handed on from layer to layer) takes as long as several layers. ``SingleStep`` stands in front of the
model's ``forward``. For a token behind a plain cache it calls embedding, angles, norm and head as the model has them,
and the layers between them one after the other. The steps are those of the model: it is taken where both ``forward``
functions are code that was looked at (``_DECODERS``, ``_HEADS``), and every layer has computed a token both ways
(``decoder_layer.py``). Everything else goes the model's way: masks, labels, hidden states, hooks between its parts.

So is a token that several answers share a step for (``together.py``), until its layers have noted it.

Memory: one token's activations.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from conmoe_edge.compat import CACHE_ARGUMENTS, Arguments, cache_of
from conmoe_edge.model.source_digest import forward_digest
from conmoe_edge.offload.fastpath.decoder_layer import FusedLayer, Meeting
from conmoe_edge.offload.fastpath.fingerprint import Fingerprint
from conmoe_edge.offload.fastpath.supported import LISTED, module_of
from conmoe_edge.offload.kernels.cpu.bindings import Positions

_DECODERS = frozenset(
    (  # one after the other those of transformers 5.24, 5.23, and 5.22 with 5.21
        # olmoe, deepseek, glm4_moe, ...
        *("9f1670fcb03d31fd", "371f907705da7e33", "91c792fcc29012b4"),
        *("1458346be7b59baf", "957f84c86dd7e782", "e84980d4c703b56d"),  # mixtral, phimoe, qwen3_moe
        *("d99504d313746c6b", "9e0db576f0e0f5d8", "c3659e037588ee67"),  # ernie4_5_moe, flex_olmo
        *("cfbf2daeba974beb", "e117e8a6a23f879f", "ba5435e31fbe2067"),  # dots1, exaone_moe
        *("2b83846591328445", "303da3d6af730cbd", "75fd652909cbe198"),  # gpt_oss
        *("f154ecc5bb82084f", "7f30478b4febbbb0", "b3a40fdd4064a9ec"),  # qwen2_moe
        *("e8ac697c2cdb43e9", "8d1d43d8902362d0", "0e3eded8c41d6c60"),  # minimax_m2
    )
)
"""Digests of ``forward`` functions that are ``embed_tokens``, ``rotary_emb`` of its result and the positions, the
``layers`` with the angles and a causal mask, ``norm``.
"""
_HEADS = frozenset(
    (
        *("6467912479ff066b", "028748e52678312c", "d147314d0c346846"),  # with the router's logits
        *("ab6646c49f047403", "f49082a0d328bee1", "bd960d34d601da84"),  # without
    )
)
"""Digests of those that are the decoder and ``lm_head`` of what it gives."""
_PARTS = ("embed_tokens", "rotary_emb", "layers", "norm")
_LOOKED_AT = frozenset(
    (*CACHE_ARGUMENTS, "input_ids", "position_ids", "attention_mask", "logits_to_keep")
)
_SAYS_NOTHING = frozenset(("use_cache", "return_dict"))
"""Arguments that may be true: what they ask for is given anyway."""
_WANTED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Settings of the configuration that ask for more than scores."""


class SingleStep:
    """Stands in front of the ``forward`` of a loaded model, for inference only."""

    def __init__(
        self, model: Any, layers: Sequence[FusedLayer], windows: set[int], meeting: Meeting
    ) -> None:
        """For a model of which ``why_around`` says nothing. ``layers``: all that it has, in their order, of which
        ``windows`` have a cache with a window, and which share the ``meeting``.
        """
        decoder = model.get_decoder()
        self._arguments = Arguments.of(model)
        self._model, self._decoder = weakref.ref(model), weakref.ref(decoder)
        self._parts = [vars(decoder)["_modules"][name] for name in _PARTS]
        self._head: nn.Module = model.lm_head
        self._layers = [
            (layer, module, index in windows)
            for index, (layer, module) in enumerate(zip(layers, decoder.layers, strict=True))
        ]
        self._meeting = meeting
        self._output: tuple[type, str] | None = None
        self._known: Fingerprint | None = None
        self._begun: Any = None

    def put_in_front(self) -> None:
        """Let the model's single tokens come this way."""
        model = self._model()
        assert model is not None, "its owner asks"
        whole = model.forward

        @functools.wraps(whole)
        def forward(*args: Any, **kwargs: Any) -> Any:
            begun, self._begun = self._begun, None
            named = self._arguments.named(args, kwargs)
            cache = cache_of(named)
            ids: Any = named.get("input_ids")
            if cache is None or self._meeting.over or not self._takes(ids, named):
                return whole(*args, **kwargs)
            if self._output is None or not (begun is cache or self._may_begin(cache)):
                out = whole(*args, **kwargs)
                self._output = _scores_only(out, cache)
                return out
            scores = self._scores(ids, named, cache)
            if scores is None:
                return whole(*args, **kwargs)
            kind, name = self._output
            return kind(**{name: cache, "logits": scores})

        model.forward = forward

    def prepare(self, cache: Any) -> bool:
        """For a token that comes next, behind those in ``cache``: whether all layers are prepared for it. They are
        where a token came this way before, and no part of the model has changed since.
        """
        self._begun = None
        if self._known is None or type(cache) is not DynamicCache:
            return False
        if not self._known.same() or not self._settings_hold():
            self._known = None
            return False
        for layer, _, window in self._layers:
            if not layer.prepare_again(cache, window):
                return False
        self._begun = cache
        return True

    def _settings_hold(self) -> bool:
        """Whether the configuration asks for scores only, and the layers compute as it says."""
        model = self._model()
        if model is None or not model.config.return_dict:
            return False
        settings = vars(model.config)
        wanted = any(settings.get(name) for name in _WANTED)
        return not wanted and self._layers[0][0].settings_hold

    def _takes(self, ids: Any, named: dict[str, Any]) -> bool:
        """Whether the arguments of a call are one token and ask for its scores."""
        if not isinstance(ids, Tensor) or ids.shape != (1, 1):
            return False
        for name, value in named.items():
            if name in _LOOKED_AT or value is None or value is False:
                continue
            if name not in _SAYS_NOTHING or value is not True:
                return False
        if named.get("use_cache") is False or named.get("return_dict") is False:
            return False
        if not isinstance(named.get("logits_to_keep", 0), int):
            return False
        places, mask = named.get("position_ids"), named.get("attention_mask")
        if places is not None and places.shape != (1, 1):
            return False
        return mask is None or (mask.dim() == 2 and bool(mask.all()))

    def _may_begin(self, cache: Any) -> bool:
        """Whether nothing stands between the parts, and every layer is ready for the token."""
        model, decoder = self._model(), self._decoder()
        if model is None or decoder is None or "forward" in vars(decoder) or _has_hooks(decoder):
            return False
        if not self._settings_hold():
            return False
        parts = vars(decoder)["_modules"]
        if any(parts.get(name) is not one for name, one in zip(_PARTS, self._parts, strict=True)):
            return False
        if vars(model)["_modules"].get("lm_head") is not self._head:
            return False
        listed = list(vars(self._parts[2])["_modules"].values())
        if len(listed) != len(self._layers):
            return False
        ready = all(
            one is module and not _has_hooks(module) and layer.may_go_alone(module, cache, window)
            for one, (layer, module, window) in zip(listed, self._layers, strict=True)
        )
        if ready:
            self._known = Fingerprint([decoder, *self._parts[2].modules()])
        return ready

    @torch.no_grad()
    def _scores(self, ids: Tensor, named: dict[str, Any], cache: Any) -> Tensor | None:
        """Scores [1, 1, V] of what follows the token; ``None``, and nothing was computed, where the operator does not
        take it.

        Raises:
            Apart, Gathered: of a token that others share a step for.
        """
        embed, turn, _, norm = self._parts
        x, places = embed(ids), named.get("position_ids")
        if places is None:
            places = torch.tensor([[cache.get_seq_length()]])
        angles = {"position_embeddings": turn(x, places)}
        positions: dict[int, Positions] = {}
        for layer, _, _ in self._layers:
            if id(layer.spec) not in positions:
                found = layer.place_of(angles)
                if found is None or x.dtype != torch.bfloat16:
                    return None
                positions[id(layer.spec)] = found
        for layer, module, _ in self._layers:
            x = layer.alone(module, x, positions[id(layer.spec)])
        return self._head(norm(x))


def why_around(model: Any) -> str:
    """Why the steps around the layers of ``model`` are the model's own; empty where they need not be. A forward that is
    not on the list is named with its digest.
    """
    decoder = model.get_decoder()
    for module, known in ((decoder, _DECODERS), (model, _HEADS)):
        name = type(module).__name__
        try:
            digest = forward_digest(type(module))
        except OSError as error:
            return f"the source of {name} cannot be read: {error}"
        if digest not in known:
            return f"the forward of {name}, {digest}, is not on the list"
    if set(vars(decoder)["_modules"]) != set(_PARTS):
        return f"{type(decoder).__name__} has other parts than its class"
    return ""


def installed_forwards() -> dict[str, tuple[str | None, bool]]:
    """Class -> the digest of its ``forward`` in the installed transformers, ``None`` where that has no source, and
    whether its list has it: of the models that write text in the families of ``LISTED``, and of their decoders. Imports
    every family.
    """
    found: dict[str, tuple[str | None, bool]] = {}
    for family in sorted({name.partition(".")[0] for name in LISTED} - {"torch"}):
        try:
            module = module_of(family)
        except ImportError:
            continue
        for head in _models_of(module):
            decoders = [(one, _DECODERS) for one in _made_by(head, module)]
            for kind, known in (*decoders, (head, _HEADS)):
                try:
                    digest = forward_digest(kind)
                except OSError:
                    digest = None
                found[f"{family}.{kind.__name__}"] = (digest, digest in known)
    return found


def _models_of(module: ModuleType) -> list[type]:
    """The classes of a module with a decoder and a head."""
    kinds = [one for one in vars(module).values() if isinstance(one, type)]
    own = [one for one in kinds if one.__module__ == module.__name__]
    return [one for one in own if one.__name__.endswith("ForCausalLM")]


def _made_by(head: type, module: ModuleType) -> list[type]:
    """The decoder that a model makes: the models that its ``__init__`` names."""
    named = (vars(module).get(name) for name in inspect.unwrap(head.__init__).__code__.co_names)
    return [one for one in named if isinstance(one, type) and issubclass(one, PreTrainedModel)]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _scores_only(out: Any, cache: Any) -> tuple[type, str] | None:
    """The class of a model's output with scores and a cache, and its name for that; ``None`` for any other."""
    if not isinstance(out, dict):
        return None
    there = {name: one for name, one in out.items() if one is not None}
    others = [name for name in there if name != "logits"]
    if len(there) != 2 or len(others) != 1 or there[others[0]] is not cache:
        return None
    return type(out), others[0]
