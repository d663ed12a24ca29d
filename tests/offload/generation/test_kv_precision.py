"""A package with keys and values in 8 bits: one setting, the same answers at every budget and through every door."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.test_same_tokens import _generated, _in_one_chat, _served
from transformers import AutoTokenizer

from conmoe_edge.checkpoint.package.manifest_io import load_manifest, save_manifest
from conmoe_edge.errors import NotFinite, UnsupportedModel, UsageError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.integrations.vllm.layer_stacks import NotServable, check_servable
from conmoe_edge.memory.budget import Budget
from conmoe_edge.model.kv_rows import row_bytes
from conmoe_edge.offload.fastpath.kv_cache import STEP_TOKENS
from conmoe_edge.offload.fastpath.packed_cache import PackedLayer
from conmoe_edge.offload.generation.session import ChatSession
from tests.families import VOCAB, save_tokenizer, tiny_model
from tests.hand_packages import identity, write_package
from tests.scores import Turn, alone

CHUNK, CONTEXT = 16, 400


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention, windows, compressed keys and values."""
    plain = tiny_model(request.param, dtype=torch.bfloat16, max_position_embeddings=512)
    made = tmp_path_factory.mktemp("package")
    write_package(plain, made, identity(plain), prefill_chunk=CHUNK)
    save_manifest(made, replace(load_manifest(made), kv_precision="int8"))
    save_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def turns(folder: Path) -> Iterator[list[Turn]]:
    """A conversation, each turn answered as a conversation of its own, with everything resident."""
    model = load_package(folder, budget=_budget(2 << 30), context=CONTEXT)
    generator = torch.Generator().manual_seed(4)
    said, found = list[int](), list[Turn]()
    for more, count in ((CHUNK * 2 + 3, 6), (9, 1), (40, 12)):
        new = torch.randint(3, VOCAB, (more,), generator=generator)
        found.append(alone(model, said + new.tolist(), count))
        said = found[-1][0] + found[-1][1]
    yield found
    model.conmoe.close()


def _budget(nbytes: int) -> Budget:
    return Budget("cpu", nbytes, f"{nbytes}B", "test", host_bytes=0)


@pytest.mark.parametrize("slots", [1, 5, 24])
def test_every_budget_and_every_door(folder: Path, turns: list[Turn], slots: int) -> None:
    """Chat with chunks that are used again, ``generate``, and the server with kept prompts."""
    count = len(load_manifest(folder).layouts)
    model: Any = load_package(folder, device="cpu", context=CONTEXT, slots=(slots,) * count)
    assert model.conmoe.kv_precision == "int8"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _in_one_chat(model, tokenizer, turns)
    _generated(model, turns)
    _served(model, tokenizer, turns)


def test_an_override_is_another_setting(folder: Path, turns: list[Turn]) -> None:
    model: Any = load_package(
        folder, budget=_budget(2 << 30), context=CONTEXT, kv_precision="source"
    )
    prompt, tokens, scores = turns[-1]
    found = alone(model, prompt, len(tokens))
    assert model.conmoe.kv_precision == "source"
    assert not torch.equal(found[2], scores)
    assert (found[2][0].float() - scores[0].float()).abs().max() < 0.1
    model.conmoe.close()


def test_what_is_planned_is_what_the_buffers_take(folder: Path) -> None:
    """To the byte, where every token is kept; the room that is left serves as cache slots."""
    models: list[Any] = [
        load_package(folder, budget=_budget(2 << 30), context=CONTEXT, kv_precision=kept)
        for kept in ("source", "int8")
    ]
    plain, packed = [one.conmoe.cache_bytes for one in models]
    session = ChatSession(models[1], None)
    generation = session.greedy([7] * 300, 4)
    while generation.finish is None:
        generation.advance()
    layers = session._cached._cache.layers
    for layer in layers:
        if type(layer) is PackedLayer:
            held = (layer._key_buffer, layer._value_buffer)
            assert all(
                one is not None and one.shape[-2] == min(2 * STEP_TOKENS, CONTEXT) for one in held
            )
    if all(type(one) is PackedLayer for one in layers):
        taken = sum(one._key_buffer.nbytes + one._value_buffer.nbytes for one in layers)
        assert taken == packed(CONTEXT)
    width, keys = layers[0].packing.key_width, layers[0].keys
    assert keys.shape[-1] == row_bytes(width) < 2 * width
    assert packed(CONTEXT) < 0.6 * plain(CONTEXT)
    for one in models:
        one.conmoe.close()


def test_a_value_that_is_no_number_is_an_error_that_names_the_layer(folder: Path) -> None:
    model: Any = load_package(folder, budget=_budget(2 << 30), context=CONTEXT)
    names = [name for name, _ in model.named_parameters() if "layers.1.self_attn" in name]
    name = next(one for one in names if "v_proj" in one or "kv_a_layernorm" in one)
    model.get_parameter(name).data[..., 0] = float("nan")
    with pytest.raises(NotFinite) as error, torch.no_grad():
        model(torch.arange(5, 17)[None])
    assert error.value.why == f"decoder layer 1: {name} holds NaN or infinity"
    model.conmoe.close()


def test_vllm_has_a_cache_of_its_own(folder: Path) -> None:
    with pytest.raises(NotServable, match="int8") as error:
        check_servable(folder, load_manifest(folder))
    assert "--for vllm" in error.value.fix


@pytest.mark.parametrize("name", ["qwen3_next", "minimax"])
def test_what_has_no_such_form_is_refused_by_name(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    write_package(plain, tmp_path, identity(plain))
    with pytest.raises(UnsupportedModel, match=type(plain).__name__) as error:
        load_package(tmp_path, budget=_budget(2 << 30), kv_precision="int8")
    assert error.value.fix == "--kv-precision source"


def test_a_word_that_is_no_precision(folder: Path) -> None:
    with pytest.raises(UsageError, match="'int4'"):
        load_package(folder, kv_precision="int4")
