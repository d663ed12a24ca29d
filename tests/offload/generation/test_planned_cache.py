"""What the key-value cache of a conversation holds is inside what the plan counts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.integrations.load import load_package
from conmoe_edge.integrations.memory_plan import loaded_anatomy
from conmoe_edge.memory.budget import Budget
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.generation.session import ChatSession
from conmoe_edge.plan.kv_precision import with_kv
from conmoe_edge.plan.needs import needs_of
from tests.families import VOCAB, tiny_model
from tests.hand_packages import thirds, write_package


def _bytes(cache: Any) -> int:
    """Of all memory behind the tensors of a cache, shared memory once."""
    held: dict[int, int] = {}
    for layer in cache.layers:
        for value in (one for row in vars(layer).values() for one in _tensors(row)):
            if value.numel() > 1:
                held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(held.values())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [one for row in value.values() for one in _tensors(row)]
    return [one for row in value for one in _tensors(row)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("kept", ["source", "int8"])
@pytest.mark.parametrize(("family", "window"), [("gpt_oss", 64), ("afmoe", 300)])
def test_what_a_long_chunk_leaves_in_windows_is_planned_too(
    family: str, window: int, kept: str, tmp_path: Path
) -> None:
    """It is part of the workspace: the cache's own term has 512 tokens beside a window."""
    context, chunk = 1600, 1440
    plain = tiny_model(
        family, dtype=torch.bfloat16, max_position_embeddings=2048, sliding_window=window
    )
    folder = write_package(plain, tmp_path, thirds(plain), prefill_chunk=chunk)
    budget = Budget("cpu", 4 << 30, "4GiB", "")
    model: Any = load_package(folder, budget=budget, context=context, kv_precision=kept)
    needs = needs_of(with_kv(loaded_anatomy(model), kept), "cpu", context)
    beyond = needs.workspace(chunk) - needs.base_bytes - chunk * needs.chunk_bytes
    cached = CachedTokens(model, model.conmoe.prefill_chunk)
    prompt = torch.randint(3, VOCAB, (1500,)).tolist()
    most = 0
    while len(cached.held) < len(prompt):
        cached.step(prompt, len(prompt))
        most = max(most, _bytes(cached._cache))
    planned = model.conmoe.cache_bytes(context)
    model.conmoe.close()
    assert planned < most <= planned + beyond


@pytest.mark.parametrize("kept", ["source", "int8"])
@pytest.mark.parametrize("context", [90, 600])
@pytest.mark.parametrize(
    ("family", "window"), [("gpt_oss", 8), ("gpt_oss", 64), ("afmoe", 300), ("olmoe", 0)]
)
def test_no_forward_leaves_more_than_was_planned(
    family: str, window: int, context: int, kept: str, tmp_path: Path
) -> None:
    more = {"sliding_window": window} if window else {}
    plain = tiny_model(family, dtype=torch.bfloat16, max_position_embeddings=1024, **more)
    folder = write_package(plain, tmp_path, thirds(plain), prefill_chunk=min(context, 512))
    budget = Budget("cpu", 4 << 30, "4GiB", "")
    model: Any = load_package(folder, budget=budget, context=context, kv_precision=kept)
    planned = model.conmoe.cache_bytes(context)
    most = 0
    for prompt in (1, context // 2, context - 20):
        session = ChatSession(model, None)
        generation = session.greedy(
            torch.randint(3, VOCAB, (prompt,)).tolist(), min(context - prompt, 24)
        )
        while generation.finish is None:
            generation.advance()
            most = max(most, _bytes(session._cached._cache))
    model.conmoe.close()
    assert most <= planned
    assert most > planned // 3, "it was measured"
