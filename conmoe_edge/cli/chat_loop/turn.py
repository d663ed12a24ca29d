"""One question and its answer: stream the text, let Ctrl-C stop the answer alone, count what
happened.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conmoe_edge.cli.chat_loop.conversation import Message
from conmoe_edge.errors import ContextFull

if TYPE_CHECKING:
    from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
    from conmoe_edge.offload.generation.session import ChatSession


@dataclass(frozen=True, slots=True)
class Turn:
    """The answer as far as it came.

    ``stopped`` where the user ended it; ``full`` where the end of the context did.
    """

    text: str
    stopped: bool
    full: ContextFull | None = None


def run_turn(
    session: ChatSession,
    messages: Sequence[Message],
    sampling: SamplingSettings,
    show: Callable[[str], None],
) -> Turn:
    """Ask, and hand every piece of the answer to ``show`` as it comes.

    Raises:
        ContextFull: the messages leave no room for an answer.
        KeyboardInterrupt: a second Ctrl-C, before the first one took effect.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    pieces: list[str] = []
    full = None
    with stop_on_interrupt() as stop:
        try:
            for piece in session.reply(plain, sampling, stop_event=stop):
                pieces.append(piece)
                show(piece)
        except ContextFull as error:
            if not pieces:
                raise
            full = error
    return Turn("".join(pieces), stop.is_set(), full)


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one raises, for a step that does not look at
    the event.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
