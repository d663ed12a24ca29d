"""Beside llama.cpp: what it makes of a file, and what transformers makes of the model that is read from the file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import ARCHITECTURES, all_of, plain_model, write_gguf
from llama import ask, llama_python, needs_llama
from transformers import AutoConfig, AutoModelForCausalLM

from conmoe_edge.checkpoint.sources.locate import locate
from conmoe_edge.model.opened import OpenedModel, open_model
from conmoe_edge.model.tokenizers import load_tokenizer
from tests.patience import PATIENCE

STEPS = 12
TEXTS = (
    "the quick brown fox's 1234  x\n\ny thinker",
    " Ünïcode — 中文, don't! 3.14\t\r\n  end",
    "In 2024THE cat'S  12345 _x_ (a/b)\n \n",
)


def written(kind: str, folder: Path, **options: Any) -> Path:
    # llama.cpp knows the models of this family without compressed queries by their 27 layers.
    sizes = {"num_hidden_layers": 27} if kind == "deepseek_v2" else {}
    plain = plain_model(kind, folder / "plain", **sizes)
    config = AutoConfig.from_pretrained(folder / "plain")
    path = folder / "model.gguf"
    write_gguf(path, kind, config, plain, **options)
    return path


def read(opened: OpenedModel) -> Any:
    """transformers' model of the tensors and the config that are read from a file, in fp32."""
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(opened.config))
    with opened.tensors() as tensors:
        state = {name: lazy[...].float() for name, lazy in tensors.items()}
    model = kind.from_pretrained(
        None, config=opened.config, state_dict=state, dtype=torch.float32,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    return model.eval()


@needs_llama
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", ["F32", "Q8_0"])
def test_greedy_tokens_and_logits_are_those_of_llama_cpp(
    kind: str, name: str, tmp_path: Path
) -> None:
    path = written(kind, tmp_path, typed=all_of(name))
    prompt = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    theirs = ask(path, prompt=prompt, steps=STEPS)
    opened = open_model(locate(str(path)))
    model, tokens = read(opened), list(prompt)
    with torch.no_grad():
        for _ in range(STEPS):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            tokens.append(int(logits[-1].argmax()))
    assert tokens[len(prompt) :] == theirs["tokens"]
    apart = (logits - torch.from_numpy(theirs["logits"])).abs()
    if (
        name == "Q8_0"
    ):  # llama.cpp rounds the activations of such products, so that a router may choose another expert
        assert float(apart.mean()) < 0.01
    else:  # it rounds the ends of YaRN's ramp to whole numbers; gpt-oss has YaRN
        assert float(apart.max()) < (2e-3 if kind == "gpt_oss" else 1e-5)


@needs_llama
@pytest.mark.parametrize("split", ["gpt-2", "olmo", "qwen2", "llama-bpe", "gpt-4o"])
def test_texts_are_cut_as_llama_cpp_cuts_them(split: str, tmp_path: Path) -> None:
    path = written("qwen3_moe", tmp_path, split=split)
    theirs = ask(path, texts=TEXTS)
    opened = open_model(locate(str(path)))
    tokenizer = load_tokenizer(opened.folder)
    for text, wanted in zip(TEXTS, theirs["texts"], strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted
        assert tokenizer.decode(wanted) == text
    assert tokenizer.eos_token_id == theirs["eos"]


QUANTISE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread, params.pure = int(sys.argv[3]), 1, False
code = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params)
sys.exit(code)
"""
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}


@needs_llama
@pytest.mark.parametrize(("name", "number", "form"), [("Q4_K_M", 15, "q4_k"), ("Q2_K", 10, "q2_k")])
def test_a_file_by_llama_cpps_own_quantiser(
    name: str, number: int, form: str, tmp_path: Path
) -> None:
    plain = plain_model("qwen3_moe", tmp_path / "plain", **WIDE)
    config = AutoConfig.from_pretrained(tmp_path / "plain")
    write_gguf(tmp_path / "whole.gguf", "qwen3_moe", config, plain)
    path = tmp_path / f"model-{name}.gguf"
    python = llama_python()
    assert python is not None
    words = [python, "-c", QUANTISE, str(tmp_path / "whole.gguf"), str(path), str(number)]
    done = subprocess.run(words, capture_output=True, text=True, env={}, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    opened = open_model(locate(str(path)))
    assert form in opened.anatomy.source_form.split("+")
    prompt = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(2)).tolist()
    theirs = ask(path, prompt=prompt, steps=1)
    with torch.no_grad():
        logits = read(opened)(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    wanted = torch.from_numpy(theirs["logits"])
    # llama.cpp rounds activations to 8 bits beside such weights.
    assert float((logits - wanted).abs().mean()) < 0.05 * float(wanted.std())
