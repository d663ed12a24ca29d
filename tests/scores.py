"""Greedy answers with the scores that they were taken from, to compare to the bit."""

from __future__ import annotations

from typing import Any

import torch

from conmoe_edge.offload.generation.session import ChatSession

Turn = tuple[list[int], list[int], torch.Tensor]
"""A prompt, the greedy tokens after it, and the scores [count, V] that they were taken from."""


class Scores:
    """The last scores of every forward of a model."""

    def __init__(self, model: Any) -> None:
        self.rows: list[torch.Tensor] = []
        self._hook = model.register_forward_hook(self._note)

    def _note(self, module: Any, args: Any, out: Any) -> None:
        self.rows.append(out.logits[0, -1].clone())

    def last(self, count: int) -> torch.Tensor:
        self._hook.remove()
        return torch.stack(self.rows[-count:])


def alone(model: Any, prompt: list[int], count: int) -> Turn:
    """In a conversation of its own."""
    return turn(ChatSession(model, None), prompt, count)


def turn(session: ChatSession, prompt: list[int], count: int) -> Turn:
    """As the next turn of a chat."""
    scores = Scores(session.model)
    generation = session.greedy(prompt, count)
    while generation.finish is None:
        generation.advance()
    return prompt, generation.tokens[len(prompt) :], scores.last(count)
