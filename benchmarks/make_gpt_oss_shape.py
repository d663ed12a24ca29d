"""Write a checkpoint of the true shape of gpt-oss-20b in MXFP4 with random weights, for measuring.

    python -m benchmarks.make_gpt_oss_shape --out /data/gpt-oss-shape
    python -m benchmarks.make_gpt_oss_shape --out /data/gpt-oss-two-layers --layers 2

Shape, tensor names and number formats follow openai/gpt-oss-20b on the hub: 24 layers, 32 experts, top-4, hidden 2880,
expert width 2880, 13.8 GB; the routed experts are blocks of 32 E2M1 numbers with an E8M0 scale, all else is bf16. Every
tensor follows from its name and the seed, so the files are the same on every run and for every number of layers.

Blocks are random bytes, scales 2^-8 to 2^-6, so that an expert's weights have a standard deviation of about 0.02 and
its output is about as long as its input: activations stay finite through all layers. Matrices in bf16 are drawn from
N(0, 0.02), biases and sinks as well, the embedding from N(0, 1) and norms are ones, as ``make_olmoe_shape.py`` has them
and for its reasons. Such a model says nothing sensible: it is there for bytes and seconds, never for quality.

The tokenizer is that of the demo model, whose 4,096 ids are all below the vocabulary of 201,088.

A shard is written under another name and renamed when it is whole; a run that was stopped goes on with the shard that
it was at. Peak memory: a block of 8 M numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.make_olmoe_shape import TOKENIZER, TOKENIZER_FILES, draw

MX_BLOCK = 32
SCALES = (119, 120, 120, 121)
"""E8M0 codes that the scales are drawn from."""
BYTES_AT_A_TIME = 1 << 24
ITEM_BYTES = {"BF16": 2, "U8": 1}


class Entry(NamedTuple):
    """One tensor of the file; ``dtype`` is the header's code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of gpt-oss-20b."""

    layers: int = 24
    experts: int = 32
    top_k: int = 4
    hidden: int = 2880
    width: int = 2880
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    vocab: int = 201088
    window: int = 128
    context: int = 131072

    def config(self) -> dict[str, object]:
        """``config.json`` as transformers reads it."""
        kinds = ("sliding_attention", "full_attention")
        return {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "dtype": "bfloat16",
            "eos_token_id": 5,
            "experts_per_token": self.top_k,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": self.width,
            "layer_types": [kinds[layer % 2] for layer in range(self.layers)],
            "max_position_embeddings": self.context,
            "model_type": "gpt_oss",
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "output_router_logits": False,
            "pad_token_id": 1,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.window,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> Iterator[Entry]:
        """Every tensor, in the order of the files."""
        hidden, queries, keys = (
            self.hidden,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        yield Entry("model.embed_tokens.weight", "BF16", (self.vocab, hidden))
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield Entry(f"{at}.input_layernorm.weight", "BF16", (hidden,))
            for name, rows, columns in (
                ("q", queries, hidden),
                ("k", keys, hidden),
                ("v", keys, hidden),
                ("o", hidden, queries),
            ):
                yield Entry(f"{at}.self_attn.{name}_proj.weight", "BF16", (rows, columns))
                yield Entry(f"{at}.self_attn.{name}_proj.bias", "BF16", (rows,))
            yield Entry(f"{at}.self_attn.sinks", "BF16", (self.heads,))
            yield Entry(f"{at}.post_attention_layernorm.weight", "BF16", (hidden,))
            yield Entry(f"{at}.mlp.router.weight", "BF16", (self.experts, hidden))
            yield Entry(f"{at}.mlp.router.bias", "BF16", (self.experts,))
            for name, rows, columns in (
                ("gate_up_proj", 2 * self.width, hidden),
                ("down_proj", hidden, self.width),
            ):
                stack, blocks = (self.experts, rows), columns // MX_BLOCK
                yield Entry(f"{at}.mlp.experts.{name}_blocks", "U8", (*stack, blocks, 16))
                yield Entry(f"{at}.mlp.experts.{name}_scales", "U8", (*stack, blocks))
                yield Entry(f"{at}.mlp.experts.{name}_bias", "BF16", stack)
        yield Entry("model.norm.weight", "BF16", (hidden,))
        yield Entry("lm_head.weight", "BF16", (self.vocab, hidden))


def drawn(one: Entry, seed: int) -> Iterator[bytes]:
    """The bytes of a tensor, piece by piece."""
    if one.dtype == "BF16":
        yield from draw(one.name, math.prod(one.shape), seed)
        return
    import torch  # who only reads the shape has to stay small

    digest = hashlib.sha256(f"{seed}:{one.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    table = torch.tensor(SCALES, dtype=torch.uint8) if one.name.endswith("_scales") else None
    for start in range(0, one.nbytes, BYTES_AT_A_TIME):
        count = min(BYTES_AT_A_TIME, one.nbytes - start)
        words = torch.empty(-(-count // 4), dtype=torch.int32)
        words.random_(-(1 << 31), (1 << 31) - 1, generator=generator)
        found = words.view(torch.uint8)[:count]
        if table is not None:
            found = table[(found % len(table)).long()]
        yield found.numpy().tobytes()


def into_shards(tensors: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Fill shards in order up to ``limit`` bytes."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for one in tensors:
        if shards[-1] and held + one.nbytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(one)
        held += one.nbytes
    return shards


def header_of(tensors: Sequence[Entry]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON padded to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in tensors:
        span = [offset, offset + one.nbytes]
        table[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: Sequence[Entry], seed: int) -> None:
    """One safetensors file, from front to back; there under its name when it is whole."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(header_of(tensors))
        for one in tensors:
            for piece in drawn(one, seed):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # the next reader shall find the file on the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    part.replace(path)


def make(out: Path, shape: Shape, seed: int, shard_bytes: int) -> int:
    """Write the checkpoint, or what is missing of it; return its bytes of weights. The index comes last.

    Raises:
        ValueError: the folder has another shape, seed or size of shards.
    """
    facts = {"layers": shape.layers, "seed": seed, "shard_bytes": shard_bytes}
    begun = out / "begun.json"
    out.mkdir(parents=True, exist_ok=True)
    if begun.exists():
        if json.loads(begun.read_text(encoding="utf-8")) != facts:
            raise ValueError(f"{out} was begun with other settings")
    elif any(out.iterdir()):
        raise ValueError(f"{out} holds something else")
    begun.write_text(json.dumps(facts), encoding="utf-8")
    shards = into_shards(list(shape.tensors()), shard_bytes)
    place: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors"
        if not (out / name).exists():
            write_shard(out / name, shard, seed)
            print(f"wrote {name}", file=sys.stderr, flush=True)
        place.update(dict.fromkeys((one.name for one in shard), name))
    total = sum(one.nbytes for shard in shards for one in shard)
    for file in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / file, out / file)
    (out / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", encoding="utf-8")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make, or to go on with")
    parser.add_argument("--layers", type=int, default=24, help="decoder layers (24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest shard, in 10^9 bytes")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        total = make(args.out, Shape(layers=args.layers), args.seed, int(args.shard_gb * 1e9))
    except ValueError as error:
        parser.error(f"{error}; name another folder")
    seconds = time.perf_counter() - start
    print(f"{args.out}: {total / 1e9:.2f} GB of weights in {seconds:.0f} s")


if __name__ == "__main__":
    main()
