"""The router of each layer, found by looking at who makes the slots that the experts are called with.

transformers calls a layer's experts with the slots that its router chose, but nowhere says which
module that was. One forward of the whole model on the meta device tells: the router is the module
whose output holds the very tensor that the experts got. Along with its slots it gives its logits, for
every slot that there is. So there is no code for single models here.

``Selection`` says how the router chooses, from the calls of ``topk``, ``max`` and ``argmax`` that it
makes: among all slots at once, or within groups of them. ``rerouting.py`` masks at the same calls.

Nothing is allocated: meta tensors only. Raises ``UnsupportedModel`` where a layer has no such module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.model.experts import find_decoder, find_experts, part_names
from conmoe_edge.model.meta_forward import meta_forward

CHOOSING = ("topk", "max", "argmax")
"""Names of the torch functions by which routers choose."""

_LOOK = "conmoe_find_router"
_SCORING = ("softmax", "sigmoid", "softplus", "log_softmax")
_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Selection:
    """How a router chooses its slots.

    Attributes:
        chosen: slots that a token gets, what the router itself adds to the top-k included.
        groups: groups of neighbouring slots of the same size that it looks at first; 1 where it does not.
        open_groups: the best groups, within which the slots are chosen.
        per_group: best slots of a group whose scores it adds up to rank the groups.
        on_logits: whether it chooses by the logits themselves, before any softmax or sigmoid.
        calls: how many of its calls choose among all slots; none where it does so in an unknown way.
        direct: whether it makes all of those as ``torch.NAME(...)`` in its own ``forward``.
    """

    chosen: int
    groups: int = 1
    open_groups: int = 1
    per_group: int = 1
    on_logits: bool = False
    calls: int = 0
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Router:
    """The router of one layer.

    Attributes:
        path: of the module.
        module: returns a tuple; ``place`` is where the logits [..., at least ``slots``] are in it.
        slots: E, the experts of the layer.
    """

    path: str
    module: nn.Module
    place: int
    slots: int
    selection: Selection


class _Call(NamedTuple):
    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Sequence[Any]


def find_routers(model: PreTrainedModel) -> dict[int, Router]:
    """Decoder layer -> its router, in layer order.

    Args:
        model: on the meta device, all of it; its experts must still have their weights.

    Raises:
        UnsupportedModel: what chooses the slots is no module of its own.
    """
    calls = _watch(model)
    found = {}
    for layer, (path, module) in find_experts(model).items():
        slots = getattr(module, part_names(module)[0]).shape[0]
        call = calls.get(layer)
        place = None if call is None else _logits_of(call.output, slots)
        if call is None or place is None:
            raise UnsupportedModel(
                f"The router of {path} in {type(model).__name__} was not found.",
                "no module of the layer gives both its logits and the slots that the experts get",
                "choose a method that leaves the router alone, such as --method conmoe",
            )
        found[layer] = Router(call.path, call.module, place, slots, _selection(call, slots))
    return found


@contextmanager
def logits_to(router: Router, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Within it, ``take`` gets the router's logits [T, E] of every batch, before its experts run."""

    def hook(module: nn.Module, args: Any, output: Sequence[Tensor]) -> None:
        logits = output[router.place]
        take(logits.detach().reshape(-1, logits.shape[-1])[:, : router.slots])

    handle = router.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _watch(model: PreTrainedModel) -> dict[int, _Call]:
    """Layer -> the call that made the slots of its experts, in one forward on the meta device."""
    decoder = find_decoder(model)
    if decoder is None:
        return {}
    experts = decoder.experts
    layer_of = {id(module): layer for layer, (_, module) in experts.items()}
    recent: list[_Call] = []
    found: dict[int, _Call] = {}

    def look(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        layer = layer_of.get(id(module))
        if layer is not None:
            maker = next((one for one in reversed(recent) if _gives(one.output, index)), None)
            if maker is not None:
                found[layer] = maker
            recent.clear()
        return torch.zeros_like(hidden)

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            if isinstance(output, list | tuple) and len(output) > 1:
                recent.append(_Call(path, module, args, kwargs, output))

        return hook

    ALL_EXPERTS_FUNCTIONS.register(_LOOK, look)
    handles: list[RemovableHandle] = []
    configs: list[Any] = [module.config for _, module in experts.values()]
    before = [getattr(config, "_experts_implementation", None) for config in configs]
    try:
        for path, module in model.named_modules():
            if path.startswith(f"{decoder.prefix}."):
                handles.append(module.register_forward_hook(hook_for(path), with_kwargs=True))
        for config in configs:
            config._experts_implementation = _LOOK
        meta_forward(model, _TOKENS)
    finally:
        for handle in handles:
            handle.remove()
        for config, name in zip(configs, before, strict=True):
            config._experts_implementation = name
    return found


def _gives(output: Sequence[Any], index: Tensor) -> bool:
    """Whether a module's output holds the slots, as they are or in another shape."""
    if any(one is index for one in output):
        return True
    return any(
        isinstance(one, Tensor)
        and not one.is_floating_point()
        and one.numel() == index.numel()
        and one.shape[-1] == index.shape[-1]
        for one in output
    )


def _logits_of(output: Sequence[Any], slots: int) -> int | None:
    """The first floating tensor of the output that has a number for every slot."""
    sizes = {
        place: one.shape[-1]
        for place, one in enumerate(output)
        if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 0
    }
    exact = [place for place, size in sizes.items() if size == slots]
    wider = [place for place, size in sizes.items() if size > slots]
    return (exact or wider or [None])[0]


class _Recorder(TorchFunctionMode):
    """Notes the calls that choose, and whether scores were made before."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self._slots = slots
        self._scored = False
        self.on_logits = False
        self.whole: list[int | None] = []  # k of each choice among all slots
        self.grouped: tuple[int, int] | None = None  # groups and k of the first choice within them
        self.open_groups: int | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SCORING:
            self._scored = True
        elif name in CHOOSING and isinstance(scores := next(iter(args), None), Tensor):
            count = args[1] if len(args) > 1 else (kwargs or {}).get("k")
            self._note(scores.shape, count if name == "topk" else 1)
        return func(*args, **(kwargs or {}))

    def _note(self, shape: torch.Size, count: Any) -> None:
        if holds_all(shape, self._slots):
            if not self.whole and self.grouped is None:
                self.on_logits = not self._scored
            if shape[-1] == self._slots:
                self.whole.append(count)
            elif self.grouped is None:
                self.grouped = (shape[-2], count)
        elif self.grouped is not None and shape[-1] == self.grouped[0]:
            self.open_groups = count


def holds_all(shape: Sequence[int], slots: int) -> bool:
    """Whether the last axis of a shape, or its last two behind another one, are all slots."""
    if shape[-1] == slots:
        return True
    return len(shape) >= 3 and shape[-1] * shape[-2] == slots and shape[-2] > 1


def _selection(call: _Call, slots: int) -> Selection:
    recorder = _Recorder(slots)
    with torch.no_grad(), recorder:
        output = call.module(*call.args, **call.kwargs)
    direct: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        def choose(scores: Tensor, *args: Any, **kwargs: Any) -> Any:
            if holds_all(scores.shape, slots):
                direct.append(name)
            return getattr(torch, name)(scores, *args, **kwargs)

        return choose

    again = with_own_torch(call.module, {name: counting(name) for name in CHOOSING})
    if again is not None:
        with torch.no_grad():
            again(*call.args, **call.kwargs)
    chosen = next(
        one.shape[-1] for one in output if isinstance(one, Tensor) and not one.is_floating_point()
    )
    groups, per_group = recorder.grouped or (1, 1)
    return Selection(
        chosen,
        groups,
        groups if recorder.open_groups is None else recorder.open_groups,
        per_group,
        recorder.on_logits,
        len(recorder.whole),
        len(direct) == len(recorder.whole) > 0 and recorder.grouped is None,
    )


class _OwnTorch:
    """``torch`` with some of its functions replaced."""

    def __init__(self, replaced: Mapping[str, Callable[..., Any]]) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def with_own_torch(
    module: nn.Module, replaced: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any] | None:
    """The module's ``forward``, but what its code calls ``torch`` has some functions replaced.

    Nothing else sees them, and nothing but these calls costs anything. ``None`` where ``forward`` is
    no plain method of the class.
    """
    own = getattr(module.forward, "__func__", None)
    if not isinstance(own, FunctionType) or hasattr(own, "__wrapped__"):
        return None
    if own.__globals__.get("torch") is not torch:
        return None
    names = {**own.__globals__, "torch": _OwnTorch(replaced)}
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return MethodType(copy, module)
