"""``generate`` with a batch: every row is, to the bit, what its prompt gets alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.compat import Arguments
from conmoe_edge.errors import ContextFull, UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.fastpath.report import FastPathWarning, warn_once
from conmoe_edge.offload.generation import batch_rows
from conmoe_edge.offload.generation.batch_rows import RowsCache
from conmoe_edge.offload.kernels.cpu.bindings import operator
from tests.families import VOCAB, tiny_model
from tests.hand_packages import identity, write_package
from tests.offload.generation.test_shared_steps import FAMILIES

CHUNK, CONTEXT, PAD = 16, 1000, 0
pytestmark = pytest.mark.skipif(operator() is None, reason="no compiler here")


def package(folder: Path, name: str, kind: Kind = "plain", **changes: Any) -> Path:
    torch.manual_seed(0)
    plain = tiny_model(name, dtype=torch.bfloat16, max_position_embeddings=4096, **changes)
    return write_package(plain, folder, identity(plain), prefill_chunk=CHUNK, kind=kind)


@pytest.fixture
def loaded() -> Iterator[Any]:
    models = []

    def load(folder: Path, **settings: Any) -> Any:
        model: Any = load_package(folder, device="cpu", **{"context": CONTEXT, **settings})
        models.append(model)
        return model

    yield load
    for model in models:
        model.conmoe.close()


@pytest.fixture
def olmoe(tmp_path: Path, loaded: Any) -> Any:
    return loaded(package(tmp_path / "package", "olmoe"))


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 40))] for _ in range(count)]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """The batch as a tokenizer gives it that pads on the left."""
    most = max(map(len, rows))
    ids = [[PAD] * (most - len(row)) + row for row in rows]
    mask = [[0] * (most - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generated(model: Any, rows: list[list[int]], **settings: Any) -> tuple[list[list[int]], Tensor]:
    """The new tokens of every row, and the scores [n, B, V] that the model gave for them."""
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD, **settings}
    given = padded(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastPathWarning)
        out = model.generate(**given, **settings, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, given["input_ids"].shape[1] :].tolist(), torch.stack(out.logits)


def until(tokens: list[int], ends: list[int]) -> list[int]:
    """``tokens`` up to the first end mark, with it."""
    first = next((i for i, one in enumerate(tokens) if one in ends), len(tokens) - 1)
    return tokens[: first + 1]


def ends_of(model: Any, rows: list[list[int]], **settings: Any) -> list[int]:
    """Marks that end these rows at different times."""
    alone = [generated(model, [row], eos_token_id=[], **settings)[0][0] for row in rows]
    ends = [alone[0][3], alone[1][7]]
    assert len({len(until(row, ends)) for row in alone}) > 1
    return ends


def same(model: Any, rows: list[list[int]], few: Any = None, **settings: Any) -> None:
    """Whether the rows together are as each of them alone, with end marks that come at different times."""
    settings["eos_token_id"] = ends_of(model, rows, **settings)
    found, scores = generated(few or model, rows, **settings)
    plain = {**padded(rows), "do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD}
    whole = (few or model).generate(**{**plain, **settings})
    for number, row in enumerate(rows):
        alone, its = generated(model, [row], **settings)
        count = len(alone[0])
        assert found[number] == alone[0] + [PAD] * (len(found[number]) - count)
        assert torch.equal(scores[:count, number], its[:, 0])
        new = whole[number, plain["input_ids"].shape[1] :].tolist()
        assert new == found[number], "also where ended rows are computed no further"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path, loaded: Any) -> None:
    folder = package(tmp_path / "package", name, "int8" if name == "gpt_oss" else "plain")
    model, few = loaded(folder), loaded(folder, slots=(4,))
    same(model, prompts(5, seed=1))
    same(model, prompts(3, seed=2), few)
    assert few.conmoe.fast_path.live()["together"] > 0


def test_more_rows_than_a_step_takes_and_8_bits(tmp_path: Path, loaded: Any) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
    folder = package(tmp_path / "package", "qwen3_moe", "q4", **sizes)
    same(loaded(folder, kv_precision="int8", context=2000), prompts(19, seed=3))


def test_processors_and_criteria(olmoe: Any) -> None:
    rows = prompts(4, seed=4)
    same(olmoe, rows, repetition_penalty=1.3, no_repeat_ngram_size=2)
    same(olmoe, rows, min_new_tokens=9, bad_words_ids=[[5], [6, 7]])


def test_a_seed_gives_the_same_batch_again(olmoe: Any) -> None:
    """Rows draw from one generator, as transformers has it; their scores are those of their own tokens."""
    rows = prompts(3, seed=5)

    def drawn(seed: int) -> tuple[list[list[int]], Tensor]:
        torch.manual_seed(seed)
        return generated(olmoe, rows, do_sample=True, temperature=1.5, eos_token_id=[])

    first, scores = drawn(1)
    assert drawn(1)[0] == first != drawn(2)[0]
    for number, row in enumerate(rows):
        forced = iter(first[number])
        _, its = generated(
            olmoe,
            [row],
            eos_token_id=[],
            prefix_allowed_tokens_fn=lambda *_, forced=forced: [next(forced)],
        )
        assert torch.equal(its[:, 0], scores[:, number])


def test_several_answers_to_one_prompt(olmoe: Any) -> None:
    olmoe.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=3, do_sample=False)
    before = olmoe.conmoe.fast_path.live()["together"]
    settings = {"do_sample": True, "num_return_sequences": 3, "eos_token_id": [], "pad_token_id": 0}
    out = olmoe.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=6, **settings)
    layers = len(olmoe.conmoe.fast_path.layers)
    assert out.shape == (3, 9)
    assert olmoe.conmoe.fast_path.live()["together"] - before == 3 * 5 * layers


def test_an_ended_row_is_computed_no_further(olmoe: Any) -> None:
    rows = prompts(3, seed=6)
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD}
    alone = [generated(olmoe, [row], eos_token_id=[])[0][0] for row in rows]
    ends = [alone[0][2]]
    lengths = [len(until(row, ends)) for row in alone]
    before = olmoe.conmoe.fast_path.live()["tokens"]
    olmoe.generate(**padded(rows), **settings, eos_token_id=ends)
    steps = olmoe.conmoe.fast_path.live()["tokens"] - before
    most = max(lengths)
    assert len(set(lengths)) > 1
    single = sum(len(row) == 1 for row in rows)
    assert steps == sum(min(one, most) - 1 for one in lengths) + single


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"cache_implementation": "static"}, "a cache of another kind"),
        ({"own_cache": True}, "a cache of the caller's"),
        ({"hole": True}, "padding that is not on the left alone"),
        ({"output_hidden_states": True}, "hidden states"),
    ],
)
def test_what_goes_transformers_way_says_so(olmoe: Any, settings: Any, why: str) -> None:
    warn_once.cache_clear()
    settings, given = dict(settings), padded(prompts(2, seed=7))
    if settings.pop("own_cache", False):
        settings[Arguments.of(olmoe).cache] = DynamicCache(config=olmoe.config)
    if settings.pop("hole", False):
        given["attention_mask"][:, -2] = 0
    before = olmoe.conmoe.fast_path.live()["together"]
    common = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": PAD}
    with pytest.warns(FastPathWarning, match=why):
        found = olmoe.generate(**given, **common, **settings)
    assert found.shape[1] == given["input_ids"].shape[1] + 5
    assert olmoe.conmoe.fast_path.live()["together"] == before


def test_without_a_cache_nothing_is_handed_over(olmoe: Any) -> None:
    common = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": PAD, "eos_token_id": []}
    found = olmoe.generate(**padded(prompts(2, seed=8)), **common, use_cache=False)
    assert len(found) == 2 and olmoe.conmoe.fast_path.live()["together"] == 0


def test_a_batchs_cache_ends_with_it(olmoe: Any) -> None:
    rows = prompts(2, seed=9)
    common = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": PAD, "eos_token_id": []}
    out = olmoe.generate(**padded(rows), **common, return_dict_in_generate=True)
    name = Arguments.of(olmoe).cache
    cache = out[name]
    assert isinstance(cache, RowsCache) and not cache.rows
    with pytest.raises(UsageError, match="ends with them"):
        olmoe(torch.tensor([[4], [5]]), **{name: cache})
    with pytest.raises(UsageError, match="ends with them"):
        cache.crop(-1)


def test_room_ahead_stays_within_the_context(
    tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(package(tmp_path / "package", "olmoe"), context=300)
    rows, sizes = prompts(6, seed=10), list[int]()
    own = batch_rows._Batches._scores

    def seen(self: Any, of: Any, rows: Any) -> Tensor:
        scores = own(self, of, rows)
        first = [row.cached._cache.layers[0]._key_buffer.shape[-2] for row in rows]
        sizes.append(sum(first))
        return scores

    monkeypatch.setattr(batch_rows._Batches, "_scores", seen)
    generated(model, rows, max_new_tokens=10, eos_token_id=[])
    assert len(sizes) == 10 and max(sizes) <= 300
    with pytest.raises(ContextFull):
        generated(model, rows, max_new_tokens=40, eos_token_id=[])


def test_no_memory_on_the_way_changes_no_row(
    tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(tmp_path / "package", "olmoe")
    model, rows = loaded(folder, slots=(8,)), prompts(3, seed=11)
    wanted, _ = generated(model, rows, eos_token_id=[])
    kind = type(operator())
    own, left = kind.decoder_together, [0]

    def failing(*arguments: Any) -> Any:
        left[0] += 1
        if left[0] in (4, 9):
            raise MemoryError
        return own(*arguments)

    monkeypatch.setattr(kind, "decoder_together", failing)
    assert generated(model, rows, eos_token_id=[])[0] == wanted
    assert left[0] > 9
