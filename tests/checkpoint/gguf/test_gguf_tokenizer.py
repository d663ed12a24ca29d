"""The tokenizer of a GGUF file: made from its metadata, or taken from beside it, and refused where neither is right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import plain_model, vocabulary, write_gguf
from transformers import AutoConfig

from conmoe_edge.checkpoint.gguf.opened import open_gguf
from conmoe_edge.checkpoint.gguf.vocabulary import end_tokens, refusal_of, tokenizer_of
from conmoe_edge.errors import CalibrationError
from conmoe_edge.model.tokenizers import load_tokenizer
from conmoe_edge.model.tokenizers import tokenizer_of as opened_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict]:
    folder = tmp_path_factory.mktemp("plain")
    plain = plain_model("qwen3_moe", folder, num_hidden_layers=1)
    return AutoConfig.from_pretrained(folder), plain


def metadata(**more: Any) -> dict[str, Any]:
    words = vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": words["tokens"],
        "tokenizer.ggml.token_type": np.array([int(one) for one in words["types"]]),
        "tokenizer.ggml.merges": words["merges"],
        "tokenizer.ggml.eos_token_id": words["tokens"].index("<|endoftext|>"),
        "tokenizer.chat_template": words["template"],
        **more,
    }


def test_a_conversation_is_rendered_and_ends(model, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "qwen3_moe", *model)
    opened = open_gguf(tmp_path / "a.gguf")
    tokenizer = load_tokenizer(opened.folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the quick"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nthe quick<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = vocabulary()["tokens"]
    assert [words[one] for one in tokens][:2] == ["<|im_start|>", "u"]
    assert tokens.count(words.index("<|im_start|>")) == 2 and "the" in [words[o] for o in tokens]
    assert tokenizer.decode(tokens, skip_special_tokens=True).startswith("user\nthe quick")


def test_the_end_of_a_turn_is_found_where_it_is_not_named() -> None:
    words = vocabulary()["tokens"]
    both = [words.index("<|endoftext|>"), words.index("<|im_end|>")]
    assert end_tokens(metadata()) == both
    assert end_tokens(metadata(**{"tokenizer.ggml.eot_token_id": both[1]})) == both
    assert end_tokens(metadata(**{"tokenizer.chat_template": "{{ messages }}"})) == both[:1]
    assert end_tokens({}) == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "deepseek-llm"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.model": "llama"}, "no scores"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "twice"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.merges": None}, "no merges"),
    ],
)
def test_what_would_cut_text_in_another_way_is_refused(more: dict[str, Any], says: str) -> None:
    assert says in refusal_of(metadata(**more))
    assert refusal_of(metadata()) == ""


def test_pieces_with_scores_are_joined_by_their_scores() -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{one:02X}>" for one in range(256))]
    types = [2, 3, 3] + [6] * 256
    pieces = ["▁", "a", "b", "c", "ab", "bc", "▁ab", "▁abc", "abc"]
    scores = [0.0] * len(tokens) + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -4.0, -5.0, -3.0]
    made = tokenizer_of(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens + pieces,
            "tokenizer.ggml.scores": np.array(scores, np.float32),
            "tokenizer.ggml.token_type": np.array(types + [1] * len(pieces)),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
    )
    known = tokens + pieces
    assert [known[one] for one in made("abc é")["input_ids"]] == [
        "<s>", "▁abc", "▁", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    assert made.decode(made("abc é")["input_ids"], skip_special_tokens=True) == "abc é"


def test_files_beside_the_model_are_taken_where_they_are_its_own(model, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, "qwen3_moe", *model)
    made = open_gguf(path)
    write_gguf(path, "qwen3_moe", *model, split="deepseek-llm")
    opened = open_gguf(path)
    with pytest.raises(CalibrationError, match=r"a\.gguf has no tokenizer") as caught:
        opened_tokenizer(opened.folder, opened)
    assert "deepseek-llm" in caught.value.why and "beside the file" in caught.value.fix
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (made.folder / name).exists():
            shutil.copy(made.folder / name, tmp_path / name)
    opened = open_gguf(path)
    assert not opened.no_tokenizer
    found = opened_tokenizer(opened.folder, opened)
    assert found.get_vocab() == load_tokenizer(made.folder).get_vocab()
    other = vocabulary()
    other["tokens"] = [*other["tokens"][:20], "Ġother", *other["tokens"][21:]]
    write_gguf(path, "qwen3_moe", *model, split="deepseek-llm", tokens=other)
    assert "belongs to another model" in open_gguf(path).no_tokenizer


def test_a_vocabulary_that_cannot_be_is_no_tokenizer(model, tmp_path: Path) -> None:
    words = vocabulary()
    words["merges"] = [*words["merges"], "no such"]
    write_gguf(tmp_path / "a.gguf", "qwen3_moe", *model, tokens=words)
    assert "cannot be" in open_gguf(tmp_path / "a.gguf").no_tokenizer
