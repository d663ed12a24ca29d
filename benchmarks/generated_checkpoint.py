"""A checkpoint of a true shape that lies nowhere: every byte of every shard follows from a seed.

Numbers are bf16, or blocks of MXFP4 where the model is published so. A table of normal numbers is drawn once from the
seed (Philox); a tensor is a row of pieces of it, whose places follow from the tensor's name, so that any range of a
shard is a few copies out of memory.

Activations and routes stay sane through all layers. Matrices have the standard deviation 0.02 and norms are ones, so
that what a layer adds is a small part of the embedding's 1: a token stays itself, and two tokens ask for different
experts. The rows of a router are between 0.6 and 1.4 times as long as the others', so that some experts are asked for
up to twice as often as the mean and some hardly, as in trained models; with rows alike every cache policy is equal.

Peak memory: the tables, 32 MiB each of normal numbers, embeddings and bytes where they are asked for, and the headers.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import make_gpt_oss_shape, make_olmoe_shape
from benchmarks.hub_server import CHUNK, ServedFile, bytes_file
from benchmarks.make_gpt_oss_shape import SCALES, Entry

_TABLE_VALUES, _PIECE = 1 << 24, 1 << 20
_SPREAD, _EMBEDDING_SPREAD = 0.02, 1.0
_SHARD_BYTES = 4e9
SKEW = 0.4
_DEMO = Path(__file__).resolve().parents[1] / "conmoe_edge" / "data" / "demo"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
ROUTERS = (".mlp.gate.weight", ".mlp.router.weight")

Named = Entry | tuple[str, tuple[int, ...]]
"""A tensor of the file: name, code of the number format, shape; or only name and shape, of one in bf16."""


class TrueShape(Protocol):
    """What a checkpoint is made from. One with ``shards`` has so many files, others such of 4 GB; one with a ``seed``
    has other numbers.
    """

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        ...

    def tensors(self) -> Iterator[Any]:
        """``Named``, in the order of the files."""
        ...


def router_row(expert: int, experts: int, skew: float = SKEW) -> float:
    """How long an expert's row of the router is, beside 1: long ones are chosen more often. 0 is no ``skew``."""
    place = expert * 37 % experts  # so that neighbours differ
    return 1.0 - skew + 2 * skew * place / max(1, experts - 1)


@dataclass(frozen=True)
class Qwen3Shape:
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

    def tensors(self) -> Iterator[Named]:
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


@dataclass(frozen=True)
class DeepseekShape:
    """The sizes of deepseek-moe-16b-base; the first ``dense_layers`` have no experts."""

    layers: int = 28
    experts: int = 64
    top_k: int = 6
    hidden: int = 2048
    width: int = 1408
    shared: int = 2
    dense_width: int = 10944
    dense_layers: int = 1
    vocabulary: int = 102400
    heads: int = 16
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": ["DeepseekForCausalLM"],
            "model_type": "deepseek",
            "torch_dtype": "bfloat16",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "moe_intermediate_size": self.width,
            "n_routed_experts": self.experts,
            "n_shared_experts": self.shared,
            "num_experts_per_tok": self.top_k,
            "first_k_dense_replace": self.dense_layers,
            "moe_layer_freq": 1,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_hidden_layers": self.layers,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-06,
            "vocab_size": self.vocabulary,
            "bos_token_id": 0,
            "eos_token_id": 5,
            "tie_word_embeddings": False,
        }

    def tensors(self) -> Iterator[Named]:
        """Names and shapes, in the order of the published files."""
        hidden = self.hidden
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            for name in ("q", "k", "v", "o"):
                yield f"{at}.self_attn.{name}_proj.weight", (hidden, hidden)
            if layer < self.dense_layers:
                yield from _gated(f"{at}.mlp", hidden, self.dense_width)
            else:
                yield f"{at}.mlp.gate.weight", (self.experts, hidden)
                for expert in range(self.experts):
                    yield from _gated(f"{at}.mlp.experts.{expert}", hidden, self.width)
                yield from _gated(f"{at}.mlp.shared_experts", hidden, self.shared * self.width)
            yield f"{at}.input_layernorm.weight", (hidden,)
            yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)


def _gated(at: str, hidden: int, width: int) -> Iterator[Named]:
    yield f"{at}.gate_proj.weight", (width, hidden)
    yield f"{at}.up_proj.weight", (width, hidden)
    yield f"{at}.down_proj.weight", (hidden, width)


SHAPES: dict[str, Any] = {
    "qwen3-30b": Qwen3Shape(48, 128, 8, 2048, 768, 151936, 32, 4, 128, 16),
    "qwen3-3b": Qwen3Shape(12, 64, 8, 1024, 512, 151936, 16, 4, 64, 4),
    "tiny": Qwen3Shape(3, 8, 2, 64, 32, 8192, 4, 2, 16, 2),
    "deepseek-16b": DeepseekShape(),
    "gpt-oss-20b": make_gpt_oss_shape.Shape(),
    "olmoe-7b": make_olmoe_shape.Shape(),
}
"""Each a ``TrueShape`` and a dataclass with ``layers`` and ``experts``, which may be replaced."""


def entries(shape: TrueShape) -> list[Entry]:
    """All tensors of the file."""
    return [
        one if isinstance(one, Entry) else Entry(one[0], "BF16", one[1]) for one in shape.tensors()
    ]


def repository(shape: TrueShape) -> dict[str, ServedFile]:
    """The files of the model, by name."""
    seed: int = getattr(shape, "seed", 0)
    table, tensors = _Table(seed), entries(shape)
    total = sum(one.nbytes for one in tensors)
    count: int = getattr(shape, "shards", 0) or math.ceil(total / _SHARD_BYTES)
    shards: list[list[Entry]] = [[]]
    filled = 0
    for one in tensors:
        if filled >= total * len(shards) / count and len(shards) < count:
            shards.append([])
        shards[-1].append(one)
        filled += one.nbytes
    files: dict[str, ServedFile] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = _shard(seed, name, shard, table)
        weight_map.update(dict.fromkeys((one.name for one in shard), name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = bytes_file(json.dumps(index).encode())
    files["config.json"] = bytes_file(json.dumps(shape.config(), indent=1).encode())
    for name in _TOKENIZER:
        files[name] = bytes_file((_DEMO / name).read_bytes(), large=name == "tokenizer.json")
    return files


class _Table:
    """Numbers to take pieces of."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        draw = np.random.Generator(np.random.Philox(seed))
        self._normal = draw.standard_normal(_TABLE_VALUES, dtype=np.float32)
        self._numbers = _bf16(self._normal * np.float32(_SPREAD))
        self._normal = self._normal.astype(np.float16)  # for embeddings, if they are asked for
        self._ones = np.full(_PIECE // 2, 0x3F80, dtype=np.uint16)

    @cached_property
    def _wide(self) -> np.ndarray[Any, Any]:
        return _bf16(self._normal.astype(np.float32) * np.float32(_EMBEDDING_SPREAD))

    @cached_property
    def _bytes(self) -> np.ndarray[Any, Any]:
        draw = np.random.Generator(np.random.Philox(self._seed + 1))
        return draw.integers(0, 256, _TABLE_VALUES, np.uint8)

    @cached_property
    def _scales(self) -> np.ndarray[Any, Any]:
        return np.array(SCALES, np.uint8)[self._bytes % len(SCALES)]

    def piece(self, one: Entry, number: int, count: int) -> memoryview:
        """Up to 1 MiB: the ``number``-th of a tensor, of ``count`` bytes."""
        if "norm" in one.name:
            return self._ones.data.cast("B")[:count]
        digest = hashlib.blake2b(f"{one.name}#{number}".encode(), digest_size=8).digest()
        first = int.from_bytes(digest, "little") % (_TABLE_VALUES - _PIECE)
        if one.dtype == "U8":
            table = self._scales if one.name.endswith("_scales") else self._bytes
            return table.data[first : first + count]
        table = self._wide if "embed_tokens" in one.name else self._numbers
        if one.name.endswith(ROUTERS):
            start = number * _PIECE // 2
            return _stretched(table[first : first + count // 2], start, one.shape).data.cast("B")
        return table.data.cast("B")[2 * first : 2 * first + count]


def _bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _stretched(
    numbers: np.ndarray[Any, Any], start: int, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Numbers of a router [experts, hidden] from the ``start``-th on, every row as long as it should be."""
    experts, hidden = shape
    lengths = np.array([router_row(one, experts) for one in range(experts)], np.float32)
    rows = (start + np.arange(len(numbers))) // hidden
    wide = (numbers.astype(np.uint32) << 16).view(np.float32)
    return _bf16(wide * lengths[rows])


def _shard(seed: int, file: str, tensors: list[Entry], table: _Table) -> ServedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for one in tensors:
        span = [end, end + one.nbytes]
        header[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": span}
        starts.append(end)
        end += one.nbytes
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
            piece = table.piece(tensors[which], number, size)[inside : inside + stop - start]
            yield piece
            start += len(piece)

    # What the hub would call a SHA-256 is one of the seed and the place: 61 GB are not hashed for a name.
    digest = hashlib.sha256(f"{seed} {file} {text!r}".encode()).hexdigest()
    return ServedFile(len(head) + end, digest, True, read)


def total_bytes(files: Mapping[str, ServedFile]) -> int:
    """Of the weights."""
    return sum(file.size for name, file in files.items() if name.endswith(".safetensors"))


assert CHUNK == _PIECE
