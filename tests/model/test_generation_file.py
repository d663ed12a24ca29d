"""``generation_config.json``: known fields in their ranges, and nothing else of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conmoe_edge.errors import CheckpointError
from conmoe_edge.model.generation_file import read_generation
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings

VOCABULARY = 96


def read(folder: Path, name: str = "generation_config.json", **fields: Any) -> Any:
    (folder / name).write_text(json.dumps(fields))
    return read_generation(folder, VOCABULARY)


def test_known_fields_count(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        repetition_penalty=1.1,
        max_new_tokens=64,
        eos_token_id=[2, 3],
        pad_token_id=0,
    )
    assert found.eos_token_id == [2, 3] and found.pad_token_id == 0
    filled = SamplingSettings().filled(found)
    assert (filled.temperature, filled.top_k, filled.top_p) == (0.7, 20, 0.9)
    assert (filled.repetition_penalty, filled.max_tokens) == (1.1, 64)


def test_what_could_run_or_hold_something_is_not_taken(tmp_path: Path) -> None:
    named = {
        "compile_config": {"backend": "evil"},
        "cache_implementation": "static",
        "cache_config": {"a": 1},
        "custom_generate": "evil/repository",
        "watermarking_config": {"greenlist_ratio": 5},
        "continuous_batching_config": {"a": 1},
        "prompt_lookup_num_tokens": 10**9,
        "assistant_early_exit": 1,
        "num_beams": 10**9,
        "num_return_sequences": 10**9,
        "to_dict": 5,
    }
    found = read(tmp_path, eos_token_id=2, **named)
    assert all(getattr(found, name, None) is None for name in named if name != "to_dict")
    assert found.to_dict()["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", one) for one in ("hot", -1, True, [], 10**400, None.__class__.__name__)),
        *(("top_k", one) for one in (-1, 1.5, "20", {}, 2**31)),
        *(("top_p", one) for one in (-0.1, 1.1, "x")),
        *(("repetition_penalty", one) for one in (0, -1.0, [1.0])),
        *(("max_new_tokens", one) for one in (0, -5, 2.0, "9", 10**30)),
        *(
            ("eos_token_id", one)
            for one in (-1, VOCABULARY, 10**9, "2", 1.5, [2, "x"], [2, 96], {}, True)
        ),
        *(("pad_token_id", one) for one in ("0", 0.5, [0])),
        *(("do_sample", one) for one in (1, "true", [])),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json says {field} = ") as caught:
        read(tmp_path, **{field: value})
    assert caught.value.why and caught.value.fix


def test_minus_one_is_a_word_for_no_token(tmp_path: Path) -> None:
    assert read(tmp_path, pad_token_id=-1, bos_token_id=-1).pad_token_id is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged"):
        read_generation(tmp_path, VOCABULARY)


def test_without_the_file_only_tokens_of_the_config_count(tmp_path: Path) -> None:
    found = read(
        tmp_path, "config.json", text_config={"eos_token_id": 5}, temperature="hot", max_length=20
    )
    assert found.eos_token_id == 5 and found.temperature is None and found.max_length is None
