"""Router slots that cannot be chosen: tokens go to the next best of those that can.

The router's own code runs as it is. While it does, the calls by which it chooses (``topk``, ``max``,
``argmax`` over all slots, or over all slots in groups) see minus infinity in place of the scores of
the closed slots. What the mask touches is the choice alone:

* a softmax over all slots came before, so its denominator keeps the closed slots. Where the model
  renormalises the gates of its choice they are what they would be with those logits at minus
  infinity; where it does not, they are the gates that the original gives to these slots;
* sigmoid scores, selection biases and scaling factors act as they do in the original;
* groups of slots are ranked by what is open in them.

A router that chooses by its logits, before any scoring, would count the closed ones in what it does
with them afterwards (PhiMoE: a softmax over all that come near the chosen one). There the logits
themselves become minus infinity.

Most routers call ``torch.topk`` in their own code. Those get a copy of their method that calls a
masking one under this name, which costs one ``masked_fill`` a layer. The others (methods of tensors,
helper functions) run under a torch function mode, which looks at each of their calls.

Memory: a mask of E bools a layer, and one copy of the scores per choosing call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conmoe_edge.model.router import CHOOSING, Router, Selection, holds_all, with_own_torch

_CHOOSING = frozenset(CHOOSING)


def least_open(selection: Selection) -> int:
    """Slots that must stay open, the same number in every group, so that all choices can be made."""
    if selection.groups == 1:
        return selection.chosen
    in_group = -(-selection.chosen // selection.open_groups)
    return selection.groups * max(in_group, selection.per_group)


def can_choose(selection: Selection, is_open: Sequence[bool]) -> bool:
    """Whether the router always finds as many open slots as it takes, whichever groups it opens."""
    size = len(is_open) // selection.groups
    counts = [sum(is_open[at : at + size]) for at in range(0, size * selection.groups, size)]
    # Below ``per_group`` a group's rank is minus infinity: it is opened only where nothing else is left.
    ranked = sorted(count for count in counts if count >= selection.per_group)
    if len(ranked) < selection.open_groups:
        return False
    return sum(ranked[: selection.open_groups]) >= selection.chosen


def reroute(router: Router, is_open: Sequence[bool]) -> Callable[[], None]:
    """From now on the router chooses open slots only. Returns what undoes it.

    Args:
        router: of a layer; its module keeps its parameters and its code.
        is_open: [E], one flag a slot. With all of them set, nothing changes.
    """
    module = router.module
    if all(is_open):
        return lambda: None
    mode = _Masking(torch.tensor([not one for one in is_open]), router.selection.on_logits)
    direct = None
    if router.selection.direct:
        direct = with_own_torch(module, {name: mode.choosing(name) for name in CHOOSING})
    forward = _within(mode, module.forward) if direct is None else direct
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    return functools.partial(_undo, module, before)


@contextmanager
def rerouted(router: Router, is_open: Sequence[bool]) -> Iterator[None]:
    """``reroute`` for the length of a block."""
    undo = reroute(router, is_open)
    try:
        yield
    finally:
        undo()


def _within(mode: TorchFunctionMode, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return own(*args, **kwargs)

    return forward


def _undo(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = before  # type: ignore[method-assign]


class _Masking(TorchFunctionMode):
    """Hides closed slots from the calls that choose.

    Args:
        closed: [E] bool.
        logits: whether the scores that are chosen from are logits and become minus infinity for good.
    """

    def __init__(self, closed: Tensor, logits: bool) -> None:
        super().__init__()
        self._closed = closed
        self._slots = closed.numel()
        self._logits = logits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in _CHOOSING:
            args, kwargs = self._masked(func.__name__, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def choosing(self, name: str) -> Callable[..., Any]:
        """``torch.NAME`` with closed slots hidden."""
        function = getattr(torch, name)

        def choose(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._masked(name, args, kwargs)
            return function(*args, **kwargs)

        return choose

    def _masked(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        scores = args[0] if args else kwargs.get("input")
        place = 2 if name == "topk" else 1  # of the axis
        axis = kwargs.get("dim", args[place] if len(args) > place else None)
        if axis is None and name == "topk":
            axis = -1
        if not isinstance(scores, Tensor) or not isinstance(axis, int):
            return args, kwargs
        shape = scores.shape
        if axis not in (-1, len(shape) - 1) or not holds_all(shape, self._slots):
            return args, kwargs
        if self._closed.device != scores.device:
            self._closed = self._closed.to(scores.device)
        closed = self._closed
        if shape[-1] != self._slots:
            closed = closed.view(shape[-2:])
        fill = scores.masked_fill_ if self._logits else scores.masked_fill
        hidden = fill(closed, float("-inf"))
        return (hidden, *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}
