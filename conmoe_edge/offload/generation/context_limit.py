"""The context that the memory was planned for is a hard limit: nobody's cache grows beyond it
unnoticed.

``guard_context`` adds a check in front of every forward of a model. It raises ``ContextFull``
before a forward whose key-value cache would hold more tokens (over all sequences of a batch) than
were planned; nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from conmoe_edge.errors import ContextFull


def guard_context(
    model: nn.Module, context: int, make_room: Callable[[int], None] | None = None
) -> None:
    """Check every forward of ``model`` that uses a cache against ``context`` tokens.

    ``make_room`` is told, before each, how many tokens of the context the cache will hold after it.
    A batch counts as a full context: each of its sequences has windows of its own.
    """

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache") is False:
            return
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else None
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        cache = kwargs.get("past_key_values")
        held = 0 if cache is None else int(cache.get_seq_length())
        needed = tokens.shape[0] * (held + tokens.shape[1])
        if needed > context:
            raise context_full(needed, context, longest_context(model))
        if make_room is not None:
            make_room(needed if tokens.shape[0] == 1 else context)

    model.register_forward_pre_hook(check, with_kwargs=True)


def longest_context(model: Any) -> int | None:
    """Tokens that the model itself goes to; ``None`` where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def context_full(needed: int, context: int, longest: int | None) -> ContextFull:
    """The error for ``needed`` tokens where ``context`` were planned and the model goes to
    ``longest``.
    """
    why, fix = "nothing was cut", "Start a new conversation, or send a shorter message"
    if longest is not None and needed > longest:
        why += f"; the model itself goes no further than {longest}"
    else:
        room = -(-needed // 1024) * 1024
        fix = "Start a new conversation, or load with more room: "
        fix += f"--context {min(room, longest or room)}"
    return ContextFull(
        f"The conversation needs {needed} tokens, and the memory was planned for {context}.",
        why,
        fix,
    )
