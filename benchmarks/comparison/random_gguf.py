"""Write a GGUF file of a true shape with random blocks, in the types that llama.cpp would give each tensor.

    LLAMA_PYTHON -m benchmarks.comparison.random_gguf --config DIR/config.json --form Q4_K_M --out model-q4.gguf
    LLAMA_PYTHON -m benchmarks.comparison.random_gguf --config DIR/config.json --form MXFP4_MOE --experts 16 \\
        --out half.gguf

Runs in the environment that has ``gguf`` and ``llama_cpp``; needs neither torch nor transformers. Which tensor gets
which type is llama.cpp's own answer: its quantiser looks, without computing anything (``dry_run``), at a bf16 file of
that shape of which only the head is there. (MXFP4_MOE is gpt-oss as published: experts in MXFP4, the rest in bf16. Its
rows are no multiples of 256, so that most types cannot hold them; a file of fewer bytes has fewer ``--experts``.)

A block is random bytes and its scales are such that weights have a spread of ``STD`` about zero, so that activations
stay finite through all layers; the embedding has a spread of 1, norms are ones, and routers are those of
``generated_checkpoint.py``. Nothing is quantised: a file takes as long as writing it.

A file appears under its name when it is whole. Peak memory: one projection of one layer's experts, as stored.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.comparison import gguf_writer, gpt_oss_gguf
from benchmarks.comparison.gguf_writer import add_vocabulary, finish
from benchmarks.generated_checkpoint import router_row
from benchmarks.make_gpt_oss_shape import SCALES

STD, EMBEDDING_STD = 0.02, 1.0
DEMO = Path(__file__).resolve().parents[2] / "conmoe_edge" / "data" / "demo"
_SAMPLE = 512
_LINE = re.compile(r"\]\s+(\S+)\s+- \[.*type =\s*(\S+), size =[^(]*(?:\((\S+)\))?")
Array = np.ndarray[Any, Any]
Kind = gguf.GGMLQuantizationType

SCALE_AT: dict[str, int] = {
    "Q8_0": 0, "Q4_0": 0, "Q5_0": 0, "IQ4_NL": 0, "IQ4_XS": 0, "Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0,
    "Q6_K": 208, "IQ1_S": 0, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0,
}  # fmt: skip
"""Type -> the byte of a block where its scale lies, a number in fp16."""
SHIFT_AT: dict[str, tuple[int, float]] = {"Q2_K": (82, 1.5), "Q4_K": (2, 7.5), "Q5_K": (2, 15.5)}
"""Type -> where the scale of what is taken off lies, and what it is times the other so that weights are about zero."""
_IQ1_M_SCALES = slice(48, 56)
"""Four numbers of 16 bits, whose highest four bits together are the scale of a block in IQ1_M."""
AS_PUBLISHED = "MXFP4_MOE"


class Place(NamedTuple):
    """A tensor of the file; ``in_fp32`` whatever the form is."""

    name: str
    shape: tuple[int, ...]
    in_fp32: bool = False


def places(config: dict[str, Any]) -> Iterator[Place]:
    """All tensors of an OLMoE, Qwen3 or gpt-oss Mixture-of-Experts model, in the order of the file."""
    if config["model_type"] == "gpt_oss":
        yield from _gpt_oss_places(config)
        return
    hidden, experts = config["hidden_size"], config["num_experts"]
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    by_head = config["model_type"] == "qwen3_moe"
    yield Place("token_embd.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        at = f"blk.{layer}"
        yield Place(f"{at}.attn_norm.weight", (hidden,), True)
        yield Place(f"{at}.attn_q_norm.weight", (head if by_head else heads * head,), True)
        yield Place(f"{at}.attn_k_norm.weight", (head if by_head else keys * head,), True)
        yield Place(f"{at}.ffn_norm.weight", (hidden,), True)
        yield Place(f"{at}.ffn_gate_inp.weight", (experts, hidden), True)
        yield Place(f"{at}.attn_q.weight", (heads * head, hidden))
        yield Place(f"{at}.attn_k.weight", (keys * head, hidden))
        yield Place(f"{at}.attn_v.weight", (keys * head, hidden))
        yield Place(f"{at}.attn_output.weight", (hidden, heads * head))
        yield Place(f"{at}.ffn_gate_exps.weight", (experts, width, hidden))
        yield Place(f"{at}.ffn_up_exps.weight", (experts, width, hidden))
        yield Place(f"{at}.ffn_down_exps.weight", (experts, hidden, width))
    yield Place("output_norm.weight", (hidden,), True)
    yield Place("output.weight", (config["vocab_size"], hidden))


def _gpt_oss_places(config: dict[str, Any]) -> Iterator[Place]:
    hidden, width, experts = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_local_experts"],
    )
    heads = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield Place("token_embd.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        at = f"blk.{layer}"
        yield Place(f"{at}.attn_norm.weight", (hidden,), True)
        yield Place(f"{at}.post_attention_norm.weight", (hidden,), True)
        for name, rows, columns in (
            ("attn_q", heads, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, heads),
        ):
            yield Place(f"{at}.{name}.weight", (rows, columns))
            yield Place(f"{at}.{name}.bias", (rows,), True)
        yield Place(f"{at}.attn_sinks.weight", (config["num_attention_heads"],), True)
        yield Place(f"{at}.ffn_gate_inp.weight", (experts, hidden), True)
        yield Place(f"{at}.ffn_gate_inp.bias", (experts,), True)
        for name, rows, columns in (
            ("gate", width, hidden),
            ("up", width, hidden),
            ("down", hidden, width),
        ):
            yield Place(f"{at}.ffn_{name}_exps.weight", (experts, rows, columns))
            yield Place(f"{at}.ffn_{name}_exps.bias", (experts, rows), True)
    yield Place("output_norm.weight", (hidden,), True)
    yield Place("output.weight", (config["vocab_size"], hidden))


def _gpt_oss_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    gpt_oss_gguf.add_facts(writer, config, config["num_local_experts"])


def _qwen3_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The hyperparameters that llama.cpp asks of the architecture ``qwen3moe``."""
    writer.add_name("qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])


ARCHITECTURES: dict[str, tuple[str, Callable[[gguf.GGUFWriter, dict[str, Any]], None]]] = {
    "olmoe": ("olmoe", gguf_writer.add_facts),
    "qwen3_moe": ("qwen3moe", _qwen3_facts),
    "gpt_oss": ("gpt-oss", _gpt_oss_facts),
}
"""transformers' name -> llama.cpp's, and what writes its hyperparameters."""


def _head(out: Path, config: dict[str, Any], kinds: dict[str, Kind], form: str) -> gguf.GGUFWriter:
    """A writer that has written everything in front of the tensors."""
    name, add_facts = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(out, name)
    add_facts(writer, config)
    add_vocabulary(writer, DEMO, config["vocab_size"])
    file_type = gguf.LlamaFileType[f"MOSTLY_{form}"]
    key = gguf.Keys.General.FILE_TYPE
    for held in writer.kv_data:
        held.pop(key, None)
    writer.add_file_type(file_type)
    for one in places(config):
        kind = kinds[one.name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = (*one.shape[:-1], one.shape[-1] // block * size)
        count = int(np.prod(stored))
        if kind == Kind.F32:
            writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), count)
        elif kind == Kind.BF16:
            writer.add_tensor_info(one.name, one.shape, np.dtype(np.float16), count, kind)
        else:
            writer.add_tensor_info(one.name, stored, np.dtype(np.uint8), count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def types_of(config: dict[str, Any], form: str) -> dict[str, Kind]:
    """Tensor -> type, as llama.cpp's quantiser gives them for ``form``.

    Raises:
        RuntimeError: it refuses the shape, or its report has not one line a tensor.
    """
    import llama_cpp  # pyright: ignore[reportMissingImports]

    plain = {one.name: Kind.F32 if one.in_fp32 else Kind.BF16 for one in places(config)}
    if form == "BF16":
        return plain
    if form == AS_PUBLISHED:
        experts = {name: Kind.MXFP4 for name in plain if name.endswith("_exps.weight")}
        return plain | experts
    said: list[str] = []
    keep = llama_cpp.llama_log_callback(
        lambda level, text, data: said.append(text.decode(errors="replace"))
    )
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "head.gguf"
        _head(empty, config, plain, "BF16").close()
        size = sum(int(np.prod(one.shape)) * (4 if one.in_fp32 else 2) for one in places(config))
        os.truncate(empty, empty.stat().st_size + size + 64 * len(plain))  # holes: takes no room
        llama_cpp.llama_log_set(keep, ctypes.c_void_p())
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
        params.dry_run = True
        params.nthread = 1
        failed = llama_cpp.llama_model_quantize(
            os.fsencode(empty), os.fsencode(empty.with_name("none")), ctypes.byref(params)
        )
    found = {
        one[1]: Kind[(one[3] or one[2]).upper()]
        for line in "".join(said).splitlines()
        if (one := _LINE.search(line))
    }
    if failed or found.keys() != plain.keys():
        raise RuntimeError(f"llama.cpp's quantiser says no types for {form}: {said[-1:]}")
    return found


class Blocks:
    """Random tensors of any type, from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = np.random.Generator(np.random.PCG64(seed))
        self._spread: dict[str, float] = {}

    def tensor(self, one: Place, kind: Kind) -> Array:
        """As the file has it."""
        if "norm" in one.name:
            return np.ones(one.shape, np.float32)
        std = EMBEDDING_STD if one.name == "token_embd.weight" else STD
        if kind in (Kind.F32, Kind.BF16):
            values = self._draw.standard_normal(one.shape, np.float32) * np.float32(std)
            if one.name.endswith("ffn_gate_inp.weight"):
                experts = one.shape[0]
                values *= np.array([[router_row(n, experts)] for n in range(experts)], np.float32)
            return values if kind == Kind.F32 else (values.view(np.uint32) >> 16).astype(np.uint16)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = self._random(int(np.prod(one.shape)) // block, size)
        if kind == Kind.MXFP4:
            blocks[:, 0] = np.array(SCALES, np.uint8)[blocks[:, 0] % len(SCALES)]
        else:
            self._scale(blocks, kind.name, std / self._spread_of(kind))
        return blocks.reshape(*one.shape[:-1], -1)

    def _random(self, count: int, size: int) -> Array:
        words = self._draw.integers(0, 1 << 64, -(-count * size // 8), np.uint64)
        return words.view(np.uint8)[: count * size].reshape(count, size)

    @staticmethod
    def _scale(blocks: Array, kind: str, scale: float) -> None:
        if kind == "IQ1_M":
            bits = int(np.float16(scale).view(np.uint16))
            parts = blocks[:, _IQ1_M_SCALES].copy().view(np.uint16)
            high = np.array([(bits >> 4 * n & 15) << 12 for n in range(4)], np.uint16)
            blocks[:, _IQ1_M_SCALES] = ((parts & 0x0FFF) | high).view(np.uint8)
            return
        at = SCALE_AT[kind]
        blocks[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        if kind in SHIFT_AT:
            at, times = SHIFT_AT[kind]
            blocks[:, at : at + 2] = np.frombuffer(np.float16(scale * times).tobytes(), np.uint8)

    def _spread_of(self, kind: Kind) -> float:
        """Standard deviation of the weights of random blocks whose scale is 1/16."""
        if kind.name not in self._spread:
            blocks = self._random(_SAMPLE, gguf.GGML_QUANT_SIZES[kind][1])
            self._scale(blocks, kind.name, 1 / 16)
            self._spread[kind.name] = float(gguf.quants.dequantize(blocks, kind).std()) * 16
        return self._spread[kind.name]


def write(config: dict[str, Any], form: str, out: Path) -> dict[str, int]:
    """The file; bytes by type."""
    kinds = types_of(config, form)
    part = out.with_name(out.name + ".part")
    writer = _head(part, config, kinds, form)
    blocks, by_type = Blocks(), dict[str, int]()
    for one in places(config):
        data = blocks.tensor(one, kinds[one.name])
        writer.write_tensor_data(data)
        by_type[kinds[one.name].name] = by_type.get(kinds[one.name].name, 0) + data.nbytes
    writer.close()
    finish(part, out)
    return by_type


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--config", type=Path, required=True, help="config.json of the shape")
    parser.add_argument("--form", required=True, help="Q4_K_M, IQ3_S, BF16, ...")
    parser.add_argument("--experts", type=int, help="of every layer; default: as the config says")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = json.loads(args.config.read_text(encoding="utf-8"))
    if args.experts is not None:
        for name in ("num_experts", "num_local_experts"):
            if name in config:
                config[name] = args.experts
    args.out.parent.mkdir(parents=True, exist_ok=True)
    by_type = write(config, args.form, args.out)
    print(json.dumps(by_type), file=sys.stderr)


if __name__ == "__main__":
    main()
