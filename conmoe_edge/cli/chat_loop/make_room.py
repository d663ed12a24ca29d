"""What becomes of a conversation that has grown longer than its context: the oldest turns are no longer sent.

The system text and the question always stay. As the first token of a prompt then changes, all of it is computed anew;
so half of the context is made free at once, and not a turn each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from conmoe_edge.cli.chat_loop.conversation import Conversation
    from conmoe_edge.offload.generation.session import ChatSession

OnFull = Literal["drop", "stop"]
ON_FULL: tuple[OnFull, ...] = get_args(OnFull)

_LEAST_ROOM = 8
"""There is room for an answer where at least an eighth of the context is left, or what was asked for at the most."""


def make_room(
    session: ChatSession, conversation: Conversation, question: str, max_tokens: int | None
) -> int:
    """Leave out the oldest turns where an answer to ``question`` has no room otherwise.

    Returns:
        How many messages are left out now that were sent before; 0 where there is room.
    """
    context = session.context
    room = context // _LEAST_ROOM if max_tokens is None else min(max_tokens, context // _LEAST_ROOM)
    if _count(session, conversation, question) + max(1, room) <= context:
        return 0
    before = conversation.left_out
    while conversation.leave_out_a_turn():
        if _count(session, conversation, question) <= context // 2:
            break
    return conversation.left_out - before


def _count(session: ChatSession, conversation: Conversation, question: str) -> int:
    asked = conversation.asking(question)
    return session.count([{"role": one["role"], "content": one["content"]} for one in asked])
