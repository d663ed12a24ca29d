"""Greedy continuations of a batch of prompts by a streamed model, and how much they repeat themselves.

Every step needs every layer. ``held`` layers are in memory once and for all; otherwise each step
reads the whole model from the disk. The key-value cache is the model's own; a model that hands its
layers none computes every prompt anew at each step. No step depends on the memory there is.

Repetition is seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319, section 6): of the n-grams of a
continuation the share that occurred before in it, ``1 - distinct / all``, averaged over the
continuations. n is 4. A continuation ends before its first end token; one with fewer than n tokens is left out.

Peak memory: what is outside the decoder layers, one layer or (held) all of them, the cache of all
prompts, the logits of one position of each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from conmoe_edge.compress.stream.calibration_text import TokenSet
from conmoe_edge.compress.stream.layer_stream import require_cache, require_numbers
from conmoe_edge.compress.stream.streamed_model import Subject
from conmoe_edge.compress.work.part_clock import Clock
from conmoe_edge.model.packed_layers import packed_cache
from conmoe_edge.model.streaming import Batch

N_GRAM = 4


def prompts_of(tokens: TokenSet, count: int, length: int) -> Tensor:
    """[P, L]: the beginnings of at most ``count`` sequences, evenly spread; shorter where the text is."""
    longest = int(tokens.mask.sum(-1).max())
    length = min(length, longest)
    rows = [row for row in range(len(tokens.domains)) if int(tokens.mask[row].sum()) >= length]
    chosen = [rows[i * len(rows) // min(count, len(rows))] for i in range(min(count, len(rows)))]
    return tokens.ids[chosen, :length]


def continue_greedily(
    subject: Subject,
    prompts: Tensor,
    steps: int,
    *,
    held: bool,
    clock: Clock,
    tell: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """[P, steps] int64: the most likely token after each prompt of [P, L], and so on.

    ``tell`` is called with the number of steps that are done.
    """
    model = subject.model
    with torch.no_grad(), subject.held(clock) if held else nullcontext():
        with clock.part("read"):
            model.load_outside()
        given = prompts.clone()
        packed = subject.kv_precision == "int8"
        cache = packed_cache(model.model.config) if packed else None
        for step in range(steps):
            tell(step)
            new = given if cache is None or not step else given[:, -1:]
            batch = Batch(new, None, use_cache=True, cache=cache)
            with clock.part("continuations"):
                hidden = model.prologue(batch)
            if packed:
                require_cache(model, batch)
            for index in range(subject.layers):
                with nullcontext() if held else subject.layer(index, clock):
                    _no_padding(subject, index)
                    with clock.part("continuations"):
                        hidden = model.run_layer(index, hidden, batch)
            cache = batch.cache
            with clock.part("continuations"):
                logits = model.epilogue(Batch(new, None), hidden)[:, -1].float()
                require_numbers(logits)
                given = torch.cat([given, logits.argmax(-1, keepdim=True).cpu()], dim=1)
        model.drop_outside()
    return given[:, prompts.shape[1] :]


def _no_padding(subject: Subject, index: int) -> None:
    """What an earlier stream marked as padding does not concern these tokens."""
    if index in subject.model.experts:
        subject.model.experts[index][1]._conmoe_tap.keep = None  # type: ignore[union-attr]


def cut(rows: Sequence[Sequence[int]], ends: Collection[int]) -> list[list[int]]:
    """Every continuation before its first end token."""
    result = []
    for row in rows:
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        result.append(list(row[:stop]))
    return result


def repetition(rows: Sequence[Sequence[int]], n: int = N_GRAM) -> float | None:
    """seq-rep-n of token rows; ``None`` where none has n tokens."""
    shares = []
    for row in rows:
        grams = [tuple(row[start : start + n]) for start in range(len(row) - n + 1)]
        if grams:
            shares.append(1.0 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None


def common_start(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Mean number of tokens before two continuations of a prompt part."""
    lengths = []
    for one, other in zip(ours, theirs, strict=True):
        alike = [a == b for a, b in zip(one, other, strict=True)]
        lengths.append(alike.index(False) if False in alike else len(alike))
    return sum(lengths) / len(lengths)
