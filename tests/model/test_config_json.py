"""Small JSON files: what is refused before anything is built, and which names never count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, tiny_config

from conmoe_edge.errors import CheckpointError, UnsupportedModel
from conmoe_edge.model.bridge import build_meta, read_config
from conmoe_edge.model.config_json import read_settings, read_to_write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").hardlink_to(source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("[]", "no JSON object"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": NaN}', "no number"),
        ('{"a": {"b": -Infinity}}', "no number"),
        ('{"a": {"__float__": "NaN"}}', "no number"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 60 + "1" + "}" * 60, "nested more than"),
        (json.dumps({"a": [0] * (1 << 20)}), "values"),
        ('{"a": ' + "9" * 5000 + "}", "integer"),
    ],
)
def test_what_is_no_plain_json_object_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_settings(tmp_path, "config.json")
    assert why in caught.value.why and caught.value.fix


def test_infinity_is_read_where_models_have_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, {"__float__": "Infinity"}]}')
    assert read_settings(tmp_path, "config.json") == {"time_step_limit": [0.0, float("inf")]}
    assert read_to_write(tmp_path, "config.json") == {
        "time_step_limit": [0.0, {"__float__": "Infinity"}]
    }


CODE = {
    "_attn_implementation": "evil/kernel",
    "attn_implementation": "evil/kernel@main:run",
    "_attn_implementation_internal": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "experts_implementation": "evil/kernel",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "trust_remote_code": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernel"}},
    "use_kernels": True,
    "fusion_config": {"patch_embeddings": True},
    "_name_or_path": "evil/model",
    "_commit_hash": "0" * 40,
    "custom_generate": "evil/repository",
    "num_labels": 10**9,
    "get_text_config": "not a method",
    "to_dict": 5,
}


def test_names_of_code_and_of_other_files_never_count(folder: Path) -> None:
    """At the top, and inside parts of the config."""
    plain = build_meta(read_config(folder), _float())
    change(folder, **CODE, vision_config=CODE, rope_parameters={"rope_type": "default", **CODE})
    config = read_config(folder)
    assert "evil" not in json.dumps(config.to_dict(), default=str)
    assert config._attn_implementation is None and config._experts_implementation is None
    model = build_meta(config, _float())
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert model.config._experts_implementation == plain.config._experts_implementation


def _float() -> Any:
    import torch

    return torch.float32


COUNTS = (
    *("num_hidden_layers", "num_experts", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "head_dim"),
)


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [10**7, 10**9, 10**30, -(10**9), 1e9])
def test_a_size_that_no_header_shows_is_refused_before_anything_is_built(
    folder: Path, field: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conmoe_edge.model.bridge.CONFIG_MAPPING", _NoClass())
    change(folder, **{field: value})
    with pytest.raises(CheckpointError, match=field):
        read_config(folder)


class _NoClass(dict[str, Any]):
    """Knows every model type; asking for its class is an error."""

    def __contains__(self, _name: object) -> bool:
        return True


def test_sizes_inside_parts_are_bounded(folder: Path) -> None:
    change(folder, vision_config={"num_hidden_layers": 10**9})
    with pytest.raises(CheckpointError, match=r"vision_config\.num_hidden_layers"):
        read_config(folder)


def test_what_makes_nothing_larger_may_be_large(folder: Path) -> None:
    change(folder, max_position_embeddings=10**8, rope_theta=10**9, seed=2**40)
    assert read_config(folder).max_position_embeddings == 10**8


def test_a_model_far_larger_than_its_tensors_is_given_up_while_it_is_built() -> None:
    config = tiny_config("olmoe", num_hidden_layers=10**5)
    with pytest.raises(CheckpointError, match="larger model"):
        build_meta(config, _float(), tensors=100)
    small = build_meta(tiny_config("olmoe"), _float(), tensors=100)
    assert len(list(small.parameters())) < 100


Damage = dict[str, Any]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model_type": []}, UnsupportedModel),
        ({"model_type": None}, UnsupportedModel),
        ({"hidden_size": "large"}, CheckpointError),
        ({"num_experts": True}, CheckpointError),
        ({"torch_dtype": "load"}, CheckpointError),
        ({"dtype": "int8"}, CheckpointError),
        ({"dtype": {}}, CheckpointError),
        ({"architectures": "x"}, CheckpointError),
        ({"quantization_config": []}, CheckpointError),
        ({"layer_types": ["evil"]}, CheckpointError),
        ({"text_config": {}}, CheckpointError),
    ],
)
def test_words_and_kinds_that_cannot_be(folder: Path, fields: Damage, kind: type) -> None:
    change(folder, **fields)
    with pytest.raises(kind) as caught:
        read_config(folder)
    assert "\n" not in str(caught.value)
