"""Write an MXFP4 checkpoint of gpt-oss's architecture as GGUF, from the same blocks.

    LLAMA_PYTHON -m benchmarks.comparison.gpt_oss_gguf --model DIR --out whole.gguf
    LLAMA_PYTHON -m benchmarks.comparison.gpt_oss_gguf --model DIR --experts 16 --out half.gguf

Runs in the environment that has ``gguf``; needs neither torch nor transformers. By llama.cpp's conventions for this
architecture: experts in MXFP4, gate and up rows apart, other matrices in bf16, norms, biases, sinks and the router in
fp32. A block is a scale and 16 bytes there too, but a byte has the numbers j and j + 16 of its block instead of
2j and 2j + 1. With ``--experts`` only the first experts of every layer are written: a model of fewer bytes, whose
answers mean as little as those of random weights.

A file appears under its name when it is whole. Peak memory: one projection of one layer's experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.comparison.gguf_writer import add_vocabulary, finish

MXFP4 = gguf.GGMLQuantizationType.MXFP4
BF16 = gguf.GGMLQuantizationType.BF16
Array = np.ndarray[Any, Any]


class Folder:
    """The tensors of a folder of safetensors files, mapped, by name; bf16 as uint16."""

    def __init__(self, folder: Path) -> None:
        self._place: dict[str, tuple[Path, int, str, tuple[int, ...]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start = 8 + length + entry["data_offsets"][0]
                self._place[name] = (path, start, entry["dtype"], tuple(entry["shape"]))

    def __getitem__(self, name: str) -> Array:
        path, start, dtype, shape = self._place[name]
        kind = {"BF16": np.uint16, "U8": np.uint8}[dtype]
        return np.memmap(path, kind, mode="r", offset=start, shape=shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without mapping it."""
        return self._place[name][3]


class Tensor(NamedTuple):
    """One tensor of the GGUF file: ``rows`` takes every second row from there on, of gate and up."""

    name: str
    source: str
    form: str  # "bf16", "fp32" or "mxfp4"
    rows: int | None = None
    experts: int | None = None

    def _taken(self, one: Array) -> Array:
        taken = one if self.experts is None else one[: self.experts]
        return taken if self.rows is None else taken[:, self.rows :: 2]

    def shape(self, folder: Folder) -> tuple[int, ...]:
        """Of the numbers."""
        name = f"{self.source}_blocks" if self.form == "mxfp4" else self.source
        sizes = list(folder.shape(name))
        if self.form == "mxfp4":
            sizes = [*sizes[:2], sizes[2] * 32]
        if self.experts is not None:
            sizes[0] = self.experts
        if self.rows is not None:
            sizes[1] //= 2
        return tuple(sizes)

    def data(self, folder: Folder) -> Array:
        """As the file has it."""
        if self.form == "mxfp4":
            blocks = self._taken(folder[f"{self.source}_blocks"])  # [E, R, C / 32, 16]
            scales = self._taken(folder[f"{self.source}_scales"])
            return np.stack([_packed(b, s) for b, s in zip(blocks, scales, strict=True)])
        found = self._taken(folder[self.source])
        if self.form == "bf16":
            return np.ascontiguousarray(found).view(np.uint8)
        return (found.astype(np.uint32) << 16).view(np.float32)


def _packed(blocks: Array, scales: Array) -> Array:
    """[R, B, 16] and [R, B] -> [R, 17 B]."""
    codes = np.empty((*blocks.shape[:-1], 32), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = blocks & 15, blocks >> 4
    out = np.empty((*blocks.shape[:-1], 17), np.uint8)
    out[..., 0] = scales
    out[..., 1:] = codes[..., :16] | (codes[..., 16:] << 4)
    return out.reshape(len(blocks), -1)


def tensors(config: dict[str, Any], experts: int) -> Iterator[Tensor]:
    """All tensors, in the order of the file."""
    yield Tensor("token_embd.weight", "model.embed_tokens.weight", "bf16")
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        yield Tensor(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", "fp32")
        after = f"{theirs}.post_attention_layernorm.weight"
        yield Tensor(f"{ours}.post_attention_norm.weight", after, "fp32")
        for name, source in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            at = f"{theirs}.self_attn.{source}_proj"
            yield Tensor(f"{ours}.attn_{name}.weight", f"{at}.weight", "bf16")
            yield Tensor(f"{ours}.attn_{name}.bias", f"{at}.bias", "fp32")
        yield Tensor(f"{ours}.attn_sinks.weight", f"{theirs}.self_attn.sinks", "fp32")
        for part in ("weight", "bias"):
            source = f"{theirs}.mlp.router.{part}"
            yield Tensor(f"{ours}.ffn_gate_inp.{part}", source, "fp32", None, experts)
        for name, source, rows in (
            ("gate", "gate_up_proj", 0),
            ("up", "gate_up_proj", 1),
            ("down", "down_proj", None),
        ):
            at = f"{theirs}.mlp.experts.{source}"
            yield Tensor(f"{ours}.ffn_{name}_exps.weight", at, "mxfp4", rows, experts)
            yield Tensor(f"{ours}.ffn_{name}_exps.bias", f"{at}_bias", "fp32", rows, experts)
    yield Tensor("output_norm.weight", "model.norm.weight", "fp32")
    yield Tensor("output.weight", "lm_head.weight", "bf16")


def add_facts(writer: gguf.GGUFWriter, config: dict[str, Any], experts: int) -> None:
    """The hyperparameters that llama.cpp asks of the architecture ``gpt-oss``."""
    rope = config["rope_scaling"]
    writer.add_name("gpt-oss")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)


def write(model: Path, out: Path, experts: int | None) -> None:
    """The file, of all experts or of the first ones of every layer."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    count = experts or config["num_local_experts"]
    folder = Folder(model)
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, "gpt-oss")
    add_facts(writer, config, count)
    add_vocabulary(writer, model, config["vocab_size"])
    for one in tensors(config, count):
        shape = one.shape(folder)
        numbers = int(np.prod(shape))
        if one.form == "fp32":
            writer.add_tensor_info(one.name, shape, np.dtype(np.float32), numbers * 4)
        elif one.form == "bf16":
            writer.add_tensor_info(one.name, shape, np.dtype(np.float16), numbers * 2, BF16)
        else:
            stored = (*shape[:-1], shape[-1] // 32 * 17)  # bytes of a row
            writer.add_tensor_info(one.name, stored, np.dtype(np.uint8), numbers // 32 * 17, MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in tensors(config, count):
        writer.write_tensor_data(one.data(folder))
    writer.close()
    finish(part, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="made by make_gpt_oss_shape.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", type=int, help="of every layer, the first ones; default: all")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.model, args.out, args.experts)


if __name__ == "__main__":
    main()
