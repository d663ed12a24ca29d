"""What changes between the releases of transformers that this package runs on, and what torch does not promise.

Elsewhere no argument, attribute or output is named that one release has and another has not, and no private function
of torch. Each name has a test that fails when it changes (``tests/test_compat.py``). Nothing here imports transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from conmoe_edge.errors import UnsupportedModel

TRANSFORMERS = ">=5.21,<5.25"
"""The releases that the tests were run on, as in ``pyproject.toml``."""

CACHE_ARGUMENTS = ("past_key_values", "cache")
"""The key-value cache of a ``forward``, and of what it returns: the first to 5.23, the second from 5.24 on."""


def cache_of(named: Mapping[str, Any]) -> Any:
    """The key-value cache among the keyword arguments of a model's, layer's or attention's ``forward``, or in a
    model's output; ``None`` where there is none.
    """
    if type(named) is dict:
        first = named.get(CACHE_ARGUMENTS[0])
        return named.get(CACHE_ARGUMENTS[1]) if first is None else first
    # By iteration, because an output of 5.24 warns where it is asked for the old name.
    for name, value in named.items():
        if value is not None and name in CACHE_ARGUMENTS:
            return value
    return None


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that gives ``cache`` to the ``forward`` of ``model``.

    Raises:
        UnsupportedModel: its ``forward`` takes no key-value cache under a known name.
    """
    return {Arguments.of(model).cache: cache}


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the ``forward`` of a causal language model takes.

    Attributes:
        positional: names by position.
        cache: the name of its key-value cache.
    """

    positional: tuple[str, ...]
    cache: str

    @classmethod
    def of(cls, model: Any) -> Arguments:
        """Read them from the signature.

        Raises:
            UnsupportedModel: no name of a key-value cache, or of the tokens, is known.
        """
        return cls.of_function(model.forward, type(model).__name__)

    @classmethod
    def of_function(cls, forward: Callable[..., Any], owner: str) -> Arguments:
        """``of`` for a function; ``owner`` names it in the error."""
        names = tuple(inspect.signature(forward).parameters)
        cache = next((name for name in names if name in CACHE_ARGUMENTS), None)
        if cache is None or "input_ids" not in names:
            missing = "input_ids" if cache is not None else " or ".join(CACHE_ARGUMENTS)
            raise UnsupportedModel(
                f"The memory of {owner} cannot be kept within its budget with transformers "
                f"{version('transformers')}.",
                f"its forward has no argument {missing}, so that the length of a conversation cannot be counted",
                f"Install a release that was tested: pip install 'transformers{TRANSFORMERS}'",
            )
        return cls(names, cache)

    def with_cache(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that gave no cache, with one."""
        place = self.positional.index(self.cache)
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), dict(kwargs)
        left = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
        return args, {**left, self.cache: cache}

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.positional, args, strict=False)), **kwargs}


INT8_PRODUCT: Callable[..., torch.Tensor] | None = getattr(torch, "_weight_int8pack_mm", None)
"""x [T, in], int8 values [out, in], scales [out] -> [T, out]; ``None`` in a torch without it."""

INT4_PRODUCT: Callable[..., torch.Tensor] | None = getattr(
    torch.ops.aten, "_weight_int4pack_mm_for_cpu", None
)
"""x [T, in], packed values, numbers in a group, scales -> [T, out]; ``None`` in a torch without it."""

_BF16_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def native_bf16() -> bool:
    """Whether the processor multiplies in bf16; false where torch cannot tell."""
    probes = (getattr(torch.cpu, name, None) for name in _BF16_PROBES)
    return any(probe() for probe in probes if probe is not None)
