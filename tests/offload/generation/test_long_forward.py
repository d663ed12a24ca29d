"""Forwards of many tokens run in the package's chunks, and give what a chat computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from conmoe_edge.compat import Arguments, cache_of
from conmoe_edge.errors import ContextFull
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.sequence import CachedTokens
from tests.families import VOCAB, tiny_model
from tests.hand_packages import thirds, write_package

CHUNK = 16
IDS = torch.randint(3, VOCAB, (1, 45), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe", dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("package")
    return write_package(plain, folder, thirds(plain), prefill_chunk=CHUNK)


@pytest.fixture
def model(folder: Path) -> Any:
    return load_package(folder, device="cpu", slots=(2,), context=100)


@pytest.fixture
def lengths(model: Any) -> list[int]:
    """Rows that went through the first decoder layer, forward by forward."""
    seen: list[int] = []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    return seen


def _chat(model: Any, tokens: list[int]) -> torch.Tensor:
    """[1, V]: what follows ``tokens``, as a chat computes it."""
    cached, scores = CachedTokens(model, model.conmoe.prefill_chunk), None
    while scores is None:
        scores = cached.step(tokens, len(tokens))
    return scores


@torch.no_grad()
def test_the_scores_of_every_token_are_those_of_a_chat(model: Any, lengths: list[int]) -> None:
    out = model(IDS)
    assert lengths == [16, 16, 13]
    assert out.logits.shape == (1, 45, VOCAB) and cache_of(out).get_seq_length() == 45
    for end in (16, 32, 45):
        assert torch.equal(out.logits[:, end - 1], _chat(model, IDS[0, :end].tolist()))
    without = model(IDS, use_cache=False)
    assert torch.equal(without.logits, out.logits) and cache_of(without) is None
    assert torch.equal(model(IDS, return_dict=False)[0], out.logits)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, out.logits)
    for keep in (1, 13, 14, 20, 45, 60):
        assert torch.equal(model(IDS, logits_to_keep=keep).logits, out.logits[:, -keep:]), keep


@torch.no_grad()
def test_a_cache_that_ends_between_two_boundaries(model: Any, lengths: list[int]) -> None:
    cache, name = DynamicCache(config=model.config), Arguments.of(model).cache
    model(IDS[:, :20], **{name: cache})
    model(IDS[:, 20:40], **{name: cache}, attention_mask=torch.ones(1, 40, dtype=torch.long))
    assert lengths == [16, 4, 12, 8] and cache.get_seq_length() == 40
    model(IDS[:, 40:43], **{name: cache})
    assert lengths[4:] == [3]


def test_generate_stays_within_a_chunk(model: Any, lengths: list[int]) -> None:
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=[])
    assert lengths == [16, 16, 13, 1, 1]
    assert int(out[0, 45]) == int(_chat(model, IDS[0].tolist()).argmax())


@torch.no_grad()
def test_a_batch_takes_as_many_rows(model: Any, lengths: list[int]) -> None:
    rows = torch.cat([IDS, IDS.flip(1)])
    mask = torch.ones_like(rows)
    mask[0, :17] = 0  # padded on the left, past the first two pieces
    out = model(rows, attention_mask=mask)
    assert max(lengths) == CHUNK and len(lengths) == 6
    lengths.clear()
    whole = model(rows, attention_mask=mask, output_hidden_states=True)
    assert lengths == [90], "what asks for more than scores runs in one piece"
    for found, wanted, start in zip(out.logits, whole.logits, (17, 0), strict=True):
        torch.testing.assert_close(found[start:], wanted[start:], atol=0.05, rtol=0.05)


@torch.no_grad()
def test_masks_of_four_dimensions_and_positions(model: Any, lengths: list[int]) -> None:
    seen = torch.ones(45, 45).tril().bool()[None, None]
    places = torch.arange(45)[None]
    found = model(IDS, attention_mask=seen, position_ids=places).logits
    assert lengths == [16, 16, 13]
    torch.testing.assert_close(found, model(IDS).logits, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_what_runs_in_one_piece(model: Any, lengths: list[int]) -> None:
    static: Any = StaticCache(config=model.config, max_cache_len=64)
    assert model(IDS, labels=IDS).loss > 0
    model(IDS, **{Arguments.of(model).cache: static})
    model(IDS, logits_to_keep=torch.tensor([3, 4]))
    assert lengths == [45, 45, 45]


@torch.no_grad()
def test_more_than_the_context_is_refused_before_anything_runs(
    model: Any, lengths: list[int]
) -> None:
    for use_cache in (True, False):
        with pytest.raises(ContextFull, match="135 tokens"):
            model(IDS.repeat(1, 3), use_cache=use_cache)
    assert lengths == []


@torch.no_grad()
def test_a_model_with_a_cache_of_its_own(tmp_path: Path) -> None:
    """Its cache says that it holds nothing; the positions of a chat's tokens must not go by that."""
    plain = tiny_model("minimax")
    model = load_package(write_package(plain, tmp_path, thirds(plain), prefill_chunk=CHUNK))
    wanted = model(IDS, use_cache=False).logits[0]
    cached, tokens, scores = CachedTokens(model, CHUNK), IDS[0].tolist(), None
    while scores is None:
        scores = cached.step(tokens, 40)  # the last five as tokens of an answer
    torch.testing.assert_close(scores[0], wanted[-1], atol=1e-5, rtol=1e-5)
