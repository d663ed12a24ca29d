"""A model's own forward on the meta device, once, for what it shows: the cache it fills, the slots its routers make.

Some forwards look at a number before they go on: whether positions go beyond those that a rotary embedding was made
for, or whether several texts are packed into one row. Meta tensors have none. Those numbers follow from the positions
and the mask, which are known, so ``meta_forward`` computes whole numbers and truths that come from such alone a second
time on the CPU. A number that comes from a weight is unknown, and asking for it fails as it does without this.

torch works out many shapes in Python, at some 100 us a call, and the layers of a model ask for the same ones over and
over. Within a forward each shape is worked out once.

Memory: the whole numbers of a dozen or two tokens, and a shape for each kind of call.
"""

from __future__ import annotations

from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.config_json import ANOTHER_MODEL, COMPARE_CONFIG
from conmoe_edge.model.foreign import foreign

_MOST = 1 << 16
_FACTORIES = ("arange", "zeros", "ones", "full", "scalar_tensor")
_READS = torch.ops.aten._local_scalar_dense.default
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN_VALUES = (int, float, bool, str)
_NAMES = (torch.dtype, torch.device, torch.layout, torch.memory_format, OpOverload)


def meta_forward(model: PreTrainedModel, tokens: int) -> Any:
    """The output of ``model``, all of it on the meta device, for ``tokens`` tokens of one text, with its cache.

    Raises:
        UnsupportedModel: the model cannot run with what the config says.
    """
    with foreign(partial(_cannot_run, model)), torch.no_grad(), _KnownNumbers():
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        # Without a cache masks are looked into. A config's own wish for tuples or more outputs is not ours.
        return model(input_ids=ids, use_cache=True, return_dict=True)


def _cannot_run(model: PreTrainedModel, why: str) -> UnsupportedModel:
    if "meta" in why and ("item()" in why or "_local_scalar_dense" in why):
        return UnsupportedModel(
            f"{type(model).__name__} cannot be looked at without its weights.",
            f"its forward in transformers {version('transformers')} reads a number that comes from them: {why}",
            ANOTHER_MODEL,
        )
    return UnsupportedModel(
        f"{type(model).__name__} cannot run with the numbers in this config.json.",
        why,
        COMPARE_CONFIG,
    )


class _KnownNumbers(TorchDispatchMode):
    """Keeps the values of whole-number meta tensors that come from nothing but each other."""

    def __init__(self) -> None:
        super().__init__()
        self._values = WeakIdKeyDictionary()
        self._shapes = _KnownShapes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _READS and args[0] in self._values:
            return self._values[args[0]].item()
        out = self._shapes.call(func, args, kwargs)
        if func._schema.is_mutable:
            # What shares memory with the changed tensor is not known here, so nothing stays known.
            flat, _ = tree_flatten((args, kwargs))
            if any(isinstance(one, Tensor) and one in self._values for one in flat):
                self._values = WeakIdKeyDictionary()
            return out
        if isinstance(out, Tensor) and self._is_wanted(out):
            value = self._again(func, args, kwargs)
            if value is not None and value.shape == out.shape:
                self._values[out] = value
        return out

    @staticmethod
    def _is_wanted(out: Tensor) -> bool:
        whole = not out.is_floating_point() and not out.is_complex()
        return out.is_meta and whole and out.numel() <= _MOST

    def _again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The same call with the values, where all of its tensors have one."""
        flat, _ = tree_flatten((args, kwargs))
        tensors = [one for one in flat if isinstance(one, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if tensors and not all(one in self._values for one in tensors):
            return None
        if not tensors and name not in _FACTORIES:
            return None

        def known(one: Any) -> Any:
            if isinstance(one, Tensor):
                return self._values[one]
            on_meta = isinstance(one, torch.device) and one.type == "meta"
            return torch.device("cpu") if on_meta else one

        value = func(*tree_map(known, args), **tree_map(known, kwargs))
        return value if isinstance(value, Tensor) else None


class _KnownShapes:
    """Calls operators on meta tensors, and gives a new empty tensor where the shape of the same call is known."""

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Any, ...]] = {}

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` gives."""
        key = _key((func, *args, *kwargs.items())) if _makes_one_new_tensor(func) else None
        if key is None:
            return func(*args, **kwargs)
        if known := self._found.get(key):
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if type(out) is Tensor and out.is_meta:
            self._found[key] = (out.shape, out.stride(), out.dtype)
        return out


@cache
def _makes_one_new_tensor(func: Any) -> bool:
    """Whether an operator only reads its arguments, and gives one tensor that shares no memory with them."""
    schema = func._schema
    return (
        not schema.is_mutable
        and len(schema.returns) == 1
        and schema.returns[0].alias_info is None
        and str(schema.returns[0].type) == "Tensor"
    )


def _key(value: Any) -> Any:
    """What the shape of a call follows from; ``None`` where that is not known."""
    if isinstance(value, Tensor):
        if type(value) not in _PLAIN_TENSORS or not value.is_meta:
            return None
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        keys = tuple(_key(one) for one in value)
        return None if None in keys else keys
    if isinstance(value, _PLAIN_VALUES) or value is None:
        return type(value), value
    return value if isinstance(value, _NAMES) else None
