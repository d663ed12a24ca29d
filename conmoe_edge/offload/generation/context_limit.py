"""The context that the memory was planned for is a hard limit.

``guard_context`` puts a check in front of every forward of a model. It raises ``ContextFull`` before the key-value
cache holds more tokens, over all sequences of a batch, than were planned; a forward without one counts as well, as it
gets one for its own time (``long_forward.py``). Nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from conmoe_edge.compat import Arguments, cache_of
from conmoe_edge.errors import ContextFull, UnsupportedModel
from conmoe_edge.plan.request import check_positions


def guard_context(
    model: nn.Module, context: int, make_room: Callable[[int], None] | None = None
) -> None:
    """Check every forward of ``model`` against ``context`` tokens.

    ``make_room`` is told before each how many tokens of the context the cache will hold after it. A batch counts as a
    full context, because each of its sequences has windows of its own.

    Raises:
        UnsupportedModel: the arguments of the model's ``forward`` are not known, so that nothing could be counted.
    """
    arguments = Arguments.of(model)

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = arguments.named(args, kwargs)
        cache = cache_of(named)
        if cache is None:
            _refuse_unknown_names(named)
        tokens = named.get("input_ids")
        if tokens is None:
            tokens = named.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return  # the model refuses such a call itself
        held = 0 if cache is None else held_tokens(cache)
        needed = tokens.shape[0] * (held + tokens.shape[1])
        if needed > context:
            raise context_full(needed, context, longest_context(model))
        if make_room is not None:
            make_room(needed if tokens.shape[0] == 1 else context)

    model.register_forward_pre_hook(check, with_kwargs=True)


def held_tokens(cache: Any) -> int:
    """Tokens of one sequence in ``cache``. It answers for its first layer, which holds none where that layer keeps its
    state elsewhere (MiniMax).
    """
    held = int(cache.get_seq_length())
    if held:
        return held
    lengths = [getattr(layer, "get_seq_length", None) for layer in getattr(cache, "layers", ())]
    return max((int(length()) for length in lengths if length is not None), default=0)


def _refuse_unknown_names(named: Mapping[str, Any]) -> None:
    """A cache under a name that is not known would be counted as none."""
    for name, value in named.items():
        if hasattr(value, "get_seq_length"):
            raise UnsupportedModel(
                f"A key-value cache came in as {name}.",
                "its tokens could not be counted, so the memory could not be kept within its budget",
                "hand it over as past_key_values, as transformers does",
            )


def longest_context(model: Any) -> int | None:
    """Tokens that the model itself goes to; ``None`` where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_context(model: Any, context: int | None) -> None:
    """Refuse a context that the model has no positions for.

    Raises:
        UsageError: names the longest one.
    """
    longest = longest_context(model)
    if context is not None and longest is not None:
        check_positions(context, longest, type(model).__name__)


def context_full(needed: int, context: int, longest: int | None) -> ContextFull:
    """The error for ``needed`` tokens where ``context`` were planned and the model goes to ``longest``."""
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
