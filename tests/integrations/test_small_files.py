"""A package's small files through ``load`` and through transformers' own door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tokenizer, tiny_model
from hand_packages import thirds, write_package

from conmoe_edge.errors import CheckpointError, ConmoeError, PackageError, UsageError
from conmoe_edge.integrations.load import load_package

IDS = torch.tensor([[5, 9, 23, 4]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("olmoe")
    folder = write_package(model, tmp_path_factory.mktemp("whole") / "package", thirds(model))
    save_tokenizer(folder)
    return folder


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "package"))


def change(package: Path, name: str = "config.json", **fields: Any) -> None:
    path = package / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **fields}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_names_of_code_in_a_package_change_nothing(whole: Path, package: Path) -> None:
    change(
        package,
        attn_implementation="evil/kernel",
        _attn_implementation="evil/kernel",
        experts_implementation="evil/kernel",
        auto_map={"AutoModelForCausalLM": "evil.Model"},
        fusion_config={"patch_embeddings": True},
        output_hidden_states=True,
        return_dict=False,
    )
    (package / "evil.py").write_text(f"open({str(package / 'ran')!r}, 'w')")
    found, wanted = load_package(package, device="cpu"), load_package(whole, device="cpu")
    assert torch.equal(logits(found), logits(wanted))
    assert found.config._attn_implementation == wanted.config._attn_implementation
    assert not (package / "ran").exists()


def test_generation_settings_of_a_package_are_checked(package: Path) -> None:
    change(package, "generation_config.json", eos_token_id=[2], compile_config={"backend": "evil"})
    model = load_package(package, device="cpu")
    assert model.generation_config.eos_token_id == [2]
    assert getattr(model.generation_config, "compile_config", None) is None
    change(package, "generation_config.json", eos_token_id=[10**9])
    with pytest.raises(PackageError, match="eos_token_id"):
        load_package(package, device="cpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": None},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 500},
        {"vocab_size": 1024},
        {"hidden_size": 31},
        {"num_experts": 10**9},
        {"rms_norm_eps": "x"},
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(
    package: Path, fields: dict[str, Any]
) -> None:
    change(package, **fields)
    with pytest.raises(PackageError) as caught:
        load_package(package, device="cpu")
    assert caught.value.why and caught.value.fix and "\n" not in str(caught.value)


def test_the_other_door_uses_no_kernel_that_a_file_names(package: Path) -> None:
    from transformers import AutoModelForCausalLM

    change(package, attn_implementation="evil/kernel")
    with pytest.raises(UsageError, match="no kernel"):
        AutoModelForCausalLM.from_pretrained(package)
    change(package, attn_implementation=None, experts_implementation="evil/kernel")
    with pytest.raises(UsageError, match="no kernel"):
        AutoModelForCausalLM.from_pretrained(package)


def test_the_other_door_checks_sizes(package: Path) -> None:
    from transformers import AutoModelForCausalLM

    change(package, num_hidden_layers=5000)
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        AutoModelForCausalLM.from_pretrained(package)


def test_tokens_that_the_model_does_not_know_are_not_looked_up(package: Path) -> None:
    from conmoe_edge.offload.generation.session import ChatSession

    model = load_package(package, device="cpu")
    for token in (-1, 96, 10**6):
        with pytest.raises(ConmoeError, match="does not belong to the model"):
            ChatSession(model, None).greedy([5, token], 1)
