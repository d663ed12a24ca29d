"""Every term of the sum."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conmoe_edge.model.anatomy import KVLayer
from conmoe_edge.plan.needs import (
    CUDA_BYTES,
    DENSE_BLOCK_BYTES,
    PYTHON_BYTES,
    needs_of,
)
from conmoe_edge.units import GIB, KIB


def test_olmoe_against_known_sums(olmoe):
    assert olmoe.experts_bytes == 12 * GIB
    assert olmoe.dense_bytes / GIB == pytest.approx(0.89, abs=0.005)
    assert olmoe.kv_bytes(1) == 128 * KIB
    assert olmoe.kv_bytes(4096) == GIB // 2


@pytest.mark.parametrize(("device", "first"), [("cpu", PYTHON_BYTES), ("cuda", CUDA_BYTES)])
def test_terms_of_olmoe(olmoe, device, first):
    needs = needs_of(olmoe, device, 4096)
    terms = needs.terms(12 << 20, 1000, 32)
    assert [term.nbytes for term in terms] == [first, olmoe.dense_bytes, GIB // 2, 1000, 24 << 20]
    assert sum(term.nbytes for term in terms) == needs.fixed(12 << 20) + 1000
    assert terms[2].name == "KV cache (4,096 tokens)"


def test_workspace_by_hand(olmoe):
    tokens, context, hidden, width, top_k = 512, 4096, 2048, 1024, 8
    expected = 10 * tokens * hidden * 2
    expected += tokens * top_k * (3 * width + hidden) * 2
    expected += 3 * tokens * 64 * 4
    kept = 2 * hidden * 2 * context
    expected += kept  # one layer's cache, copied as it grows
    expected += 4 * tokens * context
    expected += 50304 * (4 + 2)
    expected += DENSE_BLOCK_BYTES
    assert needs_of(olmoe, "cuda", context).workspace(tokens) == expected
    assert needs_of(olmoe, "cpu", context).workspace(tokens) == expected + 3 * hidden * width * 4


def test_grouped_heads_count_repeated(olmoe):
    grouped = replace(olmoe, kv=tuple(KVLayer(per_token=2048) for _ in olmoe.layers))
    many = needs_of(olmoe, "cuda", 4096).workspace(32) - 8192 * 4096
    assert needs_of(grouped, "cuda", 4096).workspace(32) == many + 4096 * (2048 + 4 * 2048 * 2)


def test_windows_and_linear_attention_bound_the_copy(olmoe):
    whole = needs_of(olmoe, "cuda", 4096).workspace(32)
    windowed = replace(olmoe, kv=tuple(KVLayer(per_token=8192, window=128) for _ in olmoe.layers))
    assert needs_of(windowed, "cuda", 4096).workspace(32) == whole - 8192 * (4096 - 128 - 512)
    linear = replace(olmoe, kv=tuple(KVLayer(per_token=0, constant=9999) for _ in olmoe.layers))
    assert needs_of(linear, "cuda", 4096).workspace(32) == whole - 8192 * 4096


@pytest.mark.parametrize(("packed", "held"), [(None, 8192), (4224, 4224)])
def test_a_chunk_beyond_512_tokens_fills_windows_further(olmoe, packed, held):
    """512 of its tokens are in the cache's term; one layer's are copied besides, as the model keeps them."""
    kv = tuple(
        KVLayer(8192, window=1024 if i % 2 else None, packed=packed, in_int8=packed is not None)
        for i in range(16)
    )
    mixed, whole = replace(olmoe, kv=kv), needs_of(olmoe, "cuda", 4096)
    needs = needs_of(mixed, "cuda", 4096)
    beyond = {chunk: needs.workspace(chunk) - whole.workspace(chunk) for chunk in (512, 1024, 2048)}
    assert beyond == {512: 0, 1024: 512 * (8 * held + 8192), 2048: 1536 * (8 * held + 8192)}
    short = needs_of(mixed, "cuda", 2048)  # no longer than the context
    assert short.longest - short.workspace(1024) == 1024 * short.chunk_bytes


def test_attention_that_is_not_fused_holds_its_scores(olmoe):
    more = needs_of(replace(olmoe, score_heads=16), "cpu", 4096).workspace(512)
    less = needs_of(olmoe, "cpu", 4096).workspace(512)
    assert more - less == 3 * 16 * 512 * 4096 * 2
    blocks = needs_of(replace(olmoe, score_heads=16, score_rows=64), "cpu", 4096).workspace(512)
    assert blocks - less == 3 * 16 * 64 * 4096 * 2


def test_workspace_grows_with_chunk_and_context(olmoe):
    sizes = [needs_of(olmoe, "cpu", 4096).workspace(chunk) for chunk in range(32, 2049, 32)]
    assert sizes == sorted(set(sizes))
    sizes = [needs_of(olmoe, "cpu", context).workspace(32) for context in (128, 1024, 4096)]
    assert sizes == sorted(set(sizes))
