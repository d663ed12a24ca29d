"""Chunks of a prompt in which experts get few tokens, and chunks of up to 2,048: the same scores at any number of cache
slots, and every record read at most once for each.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from conmoe_edge.checkpoint.format.manifest import MAX_CHUNK
from conmoe_edge.checkpoint.format.quantise import Kind
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import VOCAB, tiny_model
from tests.hand_packages import identity, write_package

WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def package(folder: Path, kind: str, experts: int, chunk: int, longest: int) -> Path:
    plain = tiny_model(
        "olmoe",
        dtype=torch.bfloat16,
        num_experts=experts,
        num_local_experts=experts,
        max_position_embeddings=longest,
        num_hidden_layers=2,
        **WIDE,
    )
    return write_package(plain, folder, identity(plain), kind=cast(Kind, kind), prefill_chunk=chunk)


def run(
    folder: Path, prompt: list[int], slots: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], list[Counter[int]]]:
    """Scores behind the prompt and three tokens more; which records each forward of the prompt reads."""
    model: Any = load_package(folder, device="cpu", slots=(slots,), context=context)
    store, reads = model.conmoe._store, Counter[int]()
    read = store.read_into

    def counted(number: int, *rest: Any) -> Any:
        reads[number] += 1
        return read(number, *rest)

    monkeypatch.setattr(store, "read_into", counted)
    cached, scores, forwards = CachedTokens(model, model.conmoe.prefill_chunk), [], []
    tokens = list(prompt)
    while len(cached.held) < len(prompt):
        reads.clear()
        found = cached.step(tokens, len(prompt))
        forwards.append(Counter(reads))
    assert found is not None
    scores.append(found)
    for _ in range(3):
        tokens.append(int(scores[-1].argmax()))
        found = cached.step(tokens, len(prompt))
        assert found is not None
        scores.append(found)
    model.conmoe.close()
    return scores, forwards


@pytest.mark.skipif(operator() is None, reason="no compiler here")
@pytest.mark.parametrize("kind", ["int8", "int4", "q4", "q3", "q2"])
def test_experts_with_few_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 experts, 24 tokens at a time, 3 of them each: some experts get one, some get more than few."""
    folder = package(tmp_path / "package", kind, 48, 24, 256)
    prompt = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted, reads = run(folder, prompt, 96, 128, monkeypatch)
    assert not any(reads)
    for slots in (1, 7, 60):
        found, reads = run(folder, prompt, slots, 128, monkeypatch)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert len(reads) == 3 and all(reads)
        assert all(count == 1 for forward in reads for count in forward.values())


@pytest.mark.parametrize("kind", ["plain", "q4"])
def test_the_longest_chunk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = MAX_CHUNK + 200
    folder = package(tmp_path / "package", kind, 8, MAX_CHUNK, context)
    prompt = torch.randint(
        3, VOCAB, (MAX_CHUNK + 90,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    wanted, _ = run(folder, prompt, 16, context, monkeypatch)
    for slots in (1, 5):
        found, reads = run(folder, prompt, slots, context, monkeypatch)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert len(reads) == 2
        for forward in reads:
            assert all(count == 1 for count in forward.values())
            assert 16 - slots - 1 <= len(forward) <= 16
