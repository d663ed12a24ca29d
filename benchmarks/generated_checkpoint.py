"""A checkpoint of a true shape that lies nowhere: every byte of every shard follows from a seed.

Numbers are bf16. A table of normal numbers is drawn once from the seed (Philox); a tensor is a row of pieces of it,
whose places follow from the tensor's name, so that any range of a shard is a few copies out of memory. Matrices have
the standard deviation 0.02, norms are ones. Peak memory: the table, 32 MiB, and the headers.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hub_server import CHUNK, ServedFile, bytes_file

_TABLE_VALUES, _PIECE = 1 << 24, 1 << 20
_SPREAD = 0.02
_DEMO = Path(__file__).resolve().parents[1] / "conmoe_edge" / "data" / "demo"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 Mixture-of-Experts model. ``shards`` files of about the same size."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    shards: int
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the published files."""
        hidden, heads, keys = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_proj.weight", (heads, hidden)
            yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
            yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
            yield f"{at}.self_attn.o_proj.weight", (hidden, heads)
            yield f"{at}.self_attn.q_norm.weight", (self.head_dim,)
            yield f"{at}.self_attn.k_norm.weight", (self.head_dim,)
            yield f"{at}.mlp.gate.weight", (self.experts, hidden)
            for expert in range(self.experts):
                yield f"{at}.mlp.experts.{expert}.gate_proj.weight", (self.width, hidden)
                yield f"{at}.mlp.experts.{expert}.up_proj.weight", (self.width, hidden)
                yield f"{at}.mlp.experts.{expert}.down_proj.weight", (hidden, self.width)
            yield f"{at}.input_layernorm.weight", (hidden,)
            yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)


SHAPES = {
    "qwen3-30b": Shape(48, 128, 8, 2048, 768, 151936, 32, 4, 128, 16),
    "qwen3-3b": Shape(12, 64, 8, 1024, 512, 151936, 16, 4, 64, 4),
    "tiny": Shape(3, 8, 2, 64, 32, 8192, 4, 2, 16, 2),
}


def repository(shape: Shape) -> dict[str, ServedFile]:
    """The files of the model, by name."""
    table = _Table(shape.seed)
    tensors = list(shape.tensors())
    total = sum(2 * math.prod(size) for _, size in tensors)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for one in tensors:
        if filled >= total * len(shards) / shape.shards and len(shards) < shape.shards:
            shards.append([])
        shards[-1].append(one)
        filled += 2 * math.prod(one[1])
    files: dict[str, ServedFile] = {}
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = _shard(shape.seed, name, shard, table)
        weight_map.update(dict.fromkeys((tensor for tensor, _ in shard), name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = bytes_file(json.dumps(index).encode())
    files["config.json"] = bytes_file(json.dumps(shape.config(), indent=1).encode())
    for name in _TOKENIZER:
        files[name] = bytes_file((_DEMO / name).read_bytes(), large=name == "tokenizer.json")
    return files


class _Table:
    """Normal numbers as bf16."""

    def __init__(self, seed: int) -> None:
        draw = np.random.Generator(np.random.Philox(seed))
        values = draw.standard_normal(_TABLE_VALUES, dtype=np.float32) * np.float32(_SPREAD)
        self._numbers = (values.view(np.uint32) >> 16).astype(np.uint16)
        self._ones = np.full(_PIECE // 2, 0x3F80, dtype=np.uint16)

    def piece(self, name: str, number: int, count: int) -> memoryview:
        """Up to 1 MiB: the ``number``-th of a tensor, of ``count`` bytes."""
        if "norm" in name:
            return self._ones.data.cast("B")[:count]
        digest = hashlib.blake2b(f"{name}#{number}".encode(), digest_size=8).digest()
        first = int.from_bytes(digest, "little") % (_TABLE_VALUES - _PIECE // 2)
        return self._numbers.data.cast("B")[2 * first : 2 * first + count]


def _shard(
    seed: int, file: str, tensors: list[tuple[str, tuple[int, ...]]], table: _Table
) -> ServedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, names, end = [], [], 0
    for name, size in tensors:
        nbytes = 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [end, end + nbytes]}
        starts.append(end)
        names.append(name)
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    head = len(text).to_bytes(8, "little") + text
    ends = [*starts[1:], end]

    def read(start: int, stop: int) -> Iterator[bytes | memoryview]:
        if start < len(head):
            yield head[start:stop]
            start = len(head)
        while start < stop:
            at = start - len(head)
            which = bisect_right(starts, at) - 1
            number, inside = divmod(at - starts[which], _PIECE)
            size = min(_PIECE, ends[which] - starts[which] - number * _PIECE)
            piece = table.piece(names[which], number, size)[inside : inside + stop - start]
            yield piece
            start += len(piece)

    # What the hub would call a SHA-256 is one of the seed and the place: 61 GB are not hashed for a name.
    digest = hashlib.sha256(f"{seed} {file} {text!r}".encode()).hexdigest()
    return ServedFile(len(head) + end, digest, True, read)


def total_bytes(files: Mapping[str, ServedFile]) -> int:
    """Of the weights."""
    return sum(file.size for name, file in files.items() if name.endswith(".safetensors"))


assert CHUNK == _PIECE
