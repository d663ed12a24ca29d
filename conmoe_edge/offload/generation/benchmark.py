"""How fast a loaded package runs: prompts and greedy tokens through a ``ChatSession``, timed, with
the runtime's counters taken between the phases.

``measure`` runs them; ``dense_read_bytes``, ``dense_weights`` and ``matrix_rate`` say what the
bounds are made of (``plan/speed.py``). The tokens are those of a chat's loop, without text and
without an end mark, so that every round has the same length.

Peak memory: what a chat takes; ``matrix_rate`` 24 MiB beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conmoe_edge.compat import native_bf16
from conmoe_edge.model.accelerator import synchronize
from conmoe_edge.model.experts import find_experts, part_names
from conmoe_edge.offload.compute.fused_linear import FusedLinear
from conmoe_edge.offload.generation.context_limit import context_full, longest_context
from conmoe_edge.offload.generation.session import ChatSession
from conmoe_edge.offload.kernels.cpu.bindings import operator
from conmoe_edge.offload.runtime import RuntimeStats

_WARM_PROMPT, _WARM_TOKENS = 32, 4
_MATRIX_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Phase:
    """A prompt, or the tokens after it.

    Attributes:
        tokens: that went through the model.
        seconds: they took together.
        hits, misses: prototypes that were there when a layer asked for them, or had to be brought.
        disk_bytes, host_bytes: brought to the device, by where they came from.
        waited_seconds: in which the computing thread stood still for them.
    """

    tokens: int
    seconds: float
    hits: int
    misses: int
    disk_bytes: int
    host_bytes: int
    waited_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Over the whole phase."""
        return self.tokens / self.seconds

    @property
    def requests(self) -> int:
        """Distinct prototypes that the layers asked for, over all forwards."""
        return self.hits + self.misses


@dataclass(frozen=True, slots=True)
class Round:
    """One prompt and its answer; the first token belongs to the prompt.

    ``memory_used`` is what the process held on the device at the ends of both phases, at most.
    """

    prefill: Phase
    decode: Phase
    memory_used: int


def measure(
    session: ChatSession,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    on_round: Callable[[int, Round], None] | None = None,
) -> tuple[Round, ...]:
    """A round for each of ``prompts`` (token ids): the prompt, then ``tokens`` greedy tokens.

    A short round that does not count comes first, for what happens once: kernels that are built,
    memory that is touched for the first time. ``on_round`` is called after each round that counts.

    Raises:
        ContextFull: a prompt and its tokens are longer than the session's context.
        OutOfMemory: memory ran out and nothing was left to give up.
    """
    _round(session, prompts[0][:_WARM_PROMPT], min(tokens, _WARM_TOKENS))
    rounds = []
    for number, prompt in enumerate(prompts):
        rounds.append(_round(session, prompt, tokens))
        if on_round is not None:
            on_round(number, rounds[-1])
    return tuple(rounds)


def _round(session: ChatSession, prompt: Sequence[int], tokens: int) -> Round:
    session.forget()
    generation = session.greedy(prompt, 1 + tokens)
    before, start = session.runtime.stats(), time.perf_counter()
    while not generation.made:
        generation.advance()
    middle, first = session.runtime.stats(), time.perf_counter()
    while generation.finish is None:
        generation.advance()
    end = time.perf_counter()
    if generation.finish == "context":
        longest = longest_context(session.model)
        raise context_full(len(generation.tokens), session.context, longest)
    after = session.runtime.stats()
    return Round(
        _phase(len(prompt), first - start, before, middle),
        _phase(tokens, end - first, middle, after),
        max(middle.memory_used, after.memory_used),
    )


def _phase(tokens: int, seconds: float, before: RuntimeStats, after: RuntimeStats) -> Phase:
    return Phase(
        tokens=tokens,
        seconds=seconds,
        hits=after.hits - before.hits,
        misses=after.misses - before.misses,
        disk_bytes=after.disk_bytes - before.disk_bytes,
        host_bytes=after.host_bytes - before.host_bytes,
        waited_seconds=after.waited_seconds - before.waited_seconds,
    )


def dense_read_bytes(model: nn.Module) -> int:
    """Bytes outside the routed experts that one token reads: everything but the embedding table,
    which is looked up, unless the head shares it.
    """
    return sum(one.numel() * one.element_size() for one in _dense_tensors(model))


def dense_weights(model: nn.Module) -> tuple[int, int]:
    """Weights of the dense matrices: those that every token goes through, and those of the head,
    which only the last token of a prompt does.
    """
    head = {one.data_ptr() for one in _tensors(_part(model, "get_output_embeddings"))}
    inner = last = 0
    whole = {  # of those that are stored with several numbers in a byte
        one.weight.data_ptr(): one.in_features * one.out_features
        for one in model.modules()
        if isinstance(one, nn.Linear)
    }
    for one in _dense_tensors(model):
        if one.dim() >= 2:
            # What is left in bytes are scales.
            count = whole.get(one.data_ptr(), 0 if one.dtype == torch.uint8 else one.numel())
            if one.data_ptr() in head:
                last += count
            else:
                inner += count
    return inner, last


def byte_weights(model: nn.Module) -> int:
    """Those of ``dense_weights`` that every token goes through and that a prompt's products take as bytes."""
    head = {one.data_ptr() for one in _tensors(_part(model, "get_output_embeddings"))}
    return sum(
        one.in_features * one.out_features
        for one in model.modules()
        if isinstance(one, FusedLinear) and one.in_bytes and one.weight.data_ptr() not in head
    )


def dense_kinds(model: nn.Module) -> dict[str, int]:
    """Bytes that a token reads of dense matrices in fewer bits, by their kind; not of a table that is looked up."""
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, FusedLinear) and module.stored.kind != "plain":
            parts = (module.weight, module.weight_scale)
            nbytes = sum(one.numel() * one.element_size() for one in parts if one is not None)
            found[module.stored.kind] = found.get(module.stored.kind, 0) + nbytes
    return found


def byte_rate(device: torch.device) -> float:
    """Products and sums of bytes a second that all threads make in registers; 0 where nothing is computed so."""
    engine = operator() if device.type == "cpu" else None
    if engine is None:
        return 0.0
    best, rounds = 0.0, 1 << 17
    end = time.perf_counter() + _MATRIX_SECONDS
    while (start := time.perf_counter()) < end:
        done = engine.byte_products(rounds)
        best = max(best, done / (time.perf_counter() - start))
    return best


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations a second that a large matrix product reaches here, in the better of
    float32 and bfloat16; a CPU without bf16 products is not asked for them.
    """
    best = 0.0
    for dtype in _formats(device):
        left = torch.ones(512, 2048, dtype=dtype, device=device)
        right = torch.ones(2048, 2048, dtype=dtype, device=device)
        out = torch.mm(left, right)
        end = time.perf_counter() + _MATRIX_SECONDS
        while True:
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            synchronize(device)
            now = time.perf_counter()
            best = max(best, 2 * 512 * 2048 * 2048 / (now - start))
            if now >= end:
                break
    return best


def _formats(device: torch.device) -> tuple[torch.dtype, ...]:
    # Where a processor has no such instructions one product of this size takes eight seconds, and no prompt makes any.
    by_float32_alone = device.type == "cpu" and not native_bf16()
    return (torch.float32,) if by_float32_alone else (torch.float32, torch.bfloat16)


def _dense_tensors(model: nn.Module) -> Iterator[Tensor]:
    """What a token reads beside prototypes, shared tensors once. Experts that a model has kept in
    its own modules are no part of it.
    """
    routed = {
        getattr(module, name).data_ptr()
        for _, module in find_experts(model).values()
        for name in part_names(module)
    }
    looked_up = {one.data_ptr() for one in _tensors(_part(model, "get_input_embeddings"))}
    looked_up -= {one.data_ptr() for one in _tensors(_part(model, "get_output_embeddings"))}
    seen = routed | looked_up
    for one in _tensors(model):
        if one.data_ptr() not in seen:
            seen.add(one.data_ptr())
            yield one


def _tensors(module: nn.Module | None) -> Iterator[Tensor]:
    if module is not None:
        yield from module.parameters()
        yield from module.buffers()


def _part(model: Any, getter: str) -> nn.Module | None:
    return getattr(model, getter)()
