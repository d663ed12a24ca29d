"""Seeded damage to the small files of a model: configs, tokenizer, index, special tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from random import Random
from typing import Any

FILES = {
    "config.json": 10,
    "generation_config.json": 4,
    "tokenizer_config.json": 4,
    "tokenizer.json": 4,
    "special_tokens_map.json": 1,
    "added_tokens.json": 1,
    "model.safetensors.index.json": 2,
    "chat_template.jinja": 1,
}
"""Which file is taken, and how often."""

VALUES: tuple[Any, ...] = (
    *(
        0,
        1,
        -1,
        2,
        3,
        5,
        7,
        8,
        31,
        33,
        97,
        1024,
        65536,
        10**7,
        10**9,
        2**31,
        2**63,
        10**30,
        -(10**9),
    ),
    *(0.0, -0.5, 0.5, 1.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        None,
        True,
        False,
        "",
        "x",
        "0",
        "1000000000",
        "\u0000",
        "é🙂" * 20,
        "a" * 100_000,
        "../../etc/passwd",
    ),
    *([], {}, [[]], [0], [None], [1, "a"], {"a": 1}, [1] * 5000, {"type": "x"}, {"factor": 0}),
)
PADDED = {
    "strategy": {"Fixed": 10**9},
    "direction": "Right",
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}
HOSTILE: dict[str, tuple[Any, ...]] = {
    "_attn_implementation": (
        "evil/kernel",
        "flash_attention_2",
        "paged|sdpa",
        {"": "evil/kernel"},
        5,
    ),
    "attn_implementation": ("evil/kernel@main:run", "eager", "nonsense", []),
    "_attn_implementation_internal": ("evil/kernel", 3),
    "_experts_implementation": ("evil/kernel", "nonsense", {"": "batched_mm"}),
    "experts_implementation": ("evil/kernel", "grouped_mm", 3),
    "auto_map": ({"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]}, [], 5, "evil"),
    "trust_remote_code": (True,),
    "quantization_config": (
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "conmoe"},
        {},
        [],
        "x",
        {"a": 1},
    ),
    "transformers_weights": ("../evil.safetensors", "pytorch_model.bin"),
    "configuration_files": (["config.4.0.0.json"], 5, ["x"]),
    "_name_or_path": ("evil/model", 5, None),
    "name_or_path": ("evil/model", 5),
    "_commit_hash": ("0" * 40, 5),
    "kernel_config": ({"a": "evil/kernel"},),
    "use_kernels": (True,),
    "fusion_config": ({"patch_embeddings": True}, "x"),
    "per_layer_config": ({"0": {"num_experts": 1}}, {"0": 5}, [], "x"),
    "compile_config": ({"backend": "evil"}, 5),
    "cache_implementation": ("static", "evil", 5),
    "cache_config": ({"a": 1}, 5),
    "custom_generate": ("evil/repo", 5),
    "watermarking_config": ({"greenlist_ratio": 5}, 5),
    "continuous_batching_config": ({"a": 1}, 5),
    "assistant_early_exit": (1, "x"),
    "prompt_lookup_num_tokens": (10**9, "x"),
    "num_labels": (10**9, "x", -1),
    "id2label": ({"x": 1}, {str(i): "a" for i in range(50)}, []),
    "get_text_config": ("x", 5),
    "to_dict": (5,),
    "from_pretrained": ("x",),
    "architectures": ([], "x", [5], ["AutoModel"], ["LlamaForCausalLM"], [[]], {}),
    "model_type": (
        "llama",
        "auto",
        "",
        5,
        [],
        "bert",
        "mixtral",
        "olmoe",
        "qwen3_5_moe",
        "t5",
        "whisper",
        "timm_wrapper",
    ),
    "torch_dtype": (
        "load",
        "float64",
        "int8",
        "bool",
        "complex64",
        "float8_e4m3fn",
        "torch.float16",
        5,
        "Tensor",
        [],
    ),
    "dtype": ("load", "bfloat16", "uint8", "quint8", {}, "hub"),
    "tokenizer_class": (
        "pipeline",
        "AutoModel",
        "LlamaTokenizer",
        "BertTokenizer",
        "evil",
        5,
        "__class__",
        "T5Tokenizer",
    ),
    "tokenizer_file": ("/etc/passwd", 5),
    "vocab_file": ("/etc/passwd", 5),
    "gguf_file": ("/etc/passwd", 5),
    "tokenizer_object": (5,),
    "init_inputs": ([1, 2], 5),
    "fast_tokenizer_files": (["tokenizer.4.0.json"], 5),
    "model_max_length": (10**30, -1, "x", 0, 1, 2),
    "added_tokens_decoder": (
        {"1000000000": {"content": "x"}},
        {"x": {}},
        {"0": 5},
        [],
        {"-1": {"content": "y"}},
    ),
    "extra_special_tokens": ({"a": "b"}, ["x", 5], 5, {"a": 5}),
    "additional_special_tokens": (["<x>"], 5, [5]),
    "chat_template": (
        5,
        [],
        {},
        [{"name": 1}],
        "{{ 1/0 }}",
        "{% for %}",
        "{{ messages[0].x.y }}",
        "",
    ),
    "padding": (
        {
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
        5,
    ),
    "truncation": (
        {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        5,
    ),
    "eos_token_id": (-1, 10**9, [], [1, "x"], "2", None, [2, 3], 1.5),
    "vision_config": ({}, {"num_hidden_layers": 10**9}, 5),
    "text_config": ({}, {"num_hidden_layers": 10**9}, {"model_type": "llama"}, 5),
    "rope_scaling": (
        {"rope_type": "yarn", "factor": 0},
        {"type": "dynamic"},
        {"rope_type": "evil"},
        5,
        [],
    ),
    "rope_parameters": (
        {},
        {"rope_type": "default"},
        {"rope_theta": 0, "rope_type": "default"},
        5,
        {"full_attention": 5},
    ),
    "layer_types": (
        [],
        ["full_attention"],
        ["evil"] * 3,
        5,
        ["sliding_attention"] * 3,
        ["linear_attention"] * 3,
    ),
}
DEEP = "[" * 100_000 + "]" * 100_000


READ_BY_PLAN = ("config.json", "model.safetensors.index.json")


def edit(folder: Path, random: Random, names: Collection[str] = tuple(FILES)) -> str:
    """Change one file of ``names`` (now and then two) in ``folder``; says what was done."""
    there = [name for name in names if (folder / name).exists()]
    weights = [FILES[name] for name in there]
    said = []
    for _ in range(1 if random.random() < 0.85 else 2):
        name = random.choices(there, weights)[0]
        said.append(_edit_file(folder / name, random))
    return "; ".join(said)


def _edit_file(path: Path, random: Random) -> str:
    if not path.is_file():
        return f"{path.name}: gone already"
    data = path.read_bytes()
    if path.suffix != ".json" or random.random() < 0.12:
        return f"{path.name}: {_edit_bytes(path, data, random)}"
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return f"{path.name}: {_edit_bytes(path, data, random)}"
    what = _edit_value(value, random)
    path.write_text(json.dumps(value))
    return f"{path.name}: {what}"


def _edit_value(root: Any, random: Random) -> str:
    places = list(_places(root, ()))
    if isinstance(root, dict) and random.random() < 0.25:
        key = random.choice(sorted(HOSTILE))
        holders = [root, *(v for v in root.values() if isinstance(v, dict))]
        holder = holders[0] if random.random() < 0.7 else random.choice(holders)
        holder[key] = random.choice(HOSTILE[key])
        return f"{key} = {_short(holder[key])}"
    if not places:
        return "nothing to change"
    # Half of the time a name at the top: large files consist of tokens.
    top = [(holder, key, path) for holder, key, path in places if len(path) == 1]
    holder, key, path = random.choice(top if top and random.random() < 0.6 else places)
    old = holder[key]
    kind = random.choice(
        ("set", "set", "set", "near", "near", "remove", "rename", "swap", "wrap", "deep")
    )
    if kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = random.choice(
            (old + 1, old - 1, old * 2, old // 2, -old, float(old), str(old), old * 10**6)
        )
    elif kind == "near" and isinstance(old, str):
        holder[key] = random.choice((old.upper(), old[:-1], old + "x", old[::-1], old * 1000))
    elif kind == "near" and isinstance(old, list):
        holder[key] = random.choice((old[:-1], old + old, old[::-1], old * 50, old[:1]))
    elif kind == "remove":
        del holder[key]
        return f"{'.'.join(map(str, path))} removed"
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}{random.choice('x_ é')}"] = holder.pop(key)
        return f"{'.'.join(map(str, path))} renamed"
    elif kind == "swap" and isinstance(old, dict):
        holder[key] = list(old.values())
    elif kind == "swap" and isinstance(old, list):
        holder[key] = {str(i): one for i, one in enumerate(old)}
    elif kind == "wrap":
        holder[key] = random.choice(([old], {"value": old}, {str(key): old}))
    elif kind == "deep":
        for _ in range(random.choice((30, 300))):
            old = [old] if random.random() < 0.5 else {"a": old}
        holder[key] = old
    else:
        holder[key] = random.choice(VALUES)
    return f"{'.'.join(map(str, path))} = {_short(holder[key])}"


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(value, dict):
        items: Any = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return
    for key, inner in items:
        yield value, key, (*path, key)
        yield from _places(inner, (*path, key))


def _edit_bytes(path: Path, data: bytes, random: Random) -> str:
    kind = random.choice(
        (
            "cut",
            "flip",
            "empty",
            "noise",
            "gone",
            "deep",
            "twice",
            "utf16",
            "null",
            "list",
            "link",
            "pipe",
            "folder",
        )
    )
    if kind == "cut":
        path.write_bytes(data[: random.randrange(len(data) + 1)])
    elif kind == "flip" and data:
        changed = bytearray(data)
        for _ in range(random.choice((1, 3, 20))):
            changed[random.randrange(len(changed))] = random.randrange(256)
        path.write_bytes(bytes(changed))
    elif kind == "noise":
        path.write_bytes(random.randbytes(random.choice((1, 100, 10_000))))
    elif kind == "gone":
        path.unlink()
    elif kind == "deep":
        path.write_text(random.choice((DEEP, '{"a":' * 5000 + "1" + "}" * 5000)))
    elif kind == "twice":
        path.write_bytes(data.replace(b"{", b'{"model_type": "x", "model_type": "y",', 1))
    elif kind == "utf16":
        path.write_bytes(data.decode("utf-8", "replace").encode("utf-16"))
    elif kind in ("null", "list"):
        path.write_text({"null": "null", "list": "[1, 2]"}[kind])
    elif kind in ("link", "pipe", "folder"):
        path.unlink()
        if kind == "link":
            path.symlink_to(random.choice(("/etc/passwd", "nowhere", "/dev/zero")))
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    else:
        path.write_bytes(b"")
    return kind


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
