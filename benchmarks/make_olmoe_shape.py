"""Write a checkpoint of the true shape of OLMoE-1B-7B with random weights, for measuring.

    python benchmarks/make_olmoe_shape.py --out /data/olmoe-shape
    python benchmarks/make_olmoe_shape.py --out /data/olmoe-one-layer --layers 1

Shape, tensor names and sharding follow allenai/OLMoE-1B-7B on the hub: 16 layers, 64 experts,
top-8, hidden 2048, expert width 1024, 13.8 GB in bf16, one tensor per expert and projection. Every
tensor is drawn from N(0, 0.02) by a generator of its own, seeded by its name, so the files are
the same on every run and for every number of layers. Norms are ones. The embedding is drawn from
N(0, 1): where it is as narrow as the rest, what attention gathers from a prompt drowns the token
itself, every token asks for the same experts, and a mapped file looks as if it fitted any memory.
Such a model says nothing sensible: it is there for bytes and seconds, never for quality.

The tokenizer is that of the demo model, whose 4,096 ids are all below the vocabulary of 50,304,
because OLMoE's own cannot be had offline. It changes which embedding rows are read and nothing that
is measured.

Peak memory: one block of 8 M numbers for each thread, well under 1 GB with torch itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TOKENIZER = Path(__file__).resolve().parent.parent / "conmoe_edge" / "data" / "demo"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
STD = 0.02
EMBEDDING_STD = 1.0
BLOCK = 1 << 23  # numbers drawn at a time; a multiple of 16, so that blocks do not change the draw
BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of OLMoE-1B-7B; only the number of layers is meant to be changed."""

    layers: int = 16
    experts: int = 64
    top_k: int = 8
    hidden: int = 2048
    expert_width: int = 1024
    heads: int = 16
    vocab: int = 50304
    context: int = 4096

    def config(self) -> dict[str, object]:
        """``config.json`` as transformers reads it."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "clip_qkv": None,
            "dtype": "bfloat16",
            "eos_token_id": 5,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": STD,
            "intermediate_size": self.expert_width,
            "max_position_embeddings": self.context,
            "model_type": "olmoe",
            "norm_topk_prob": False,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "output_router_logits": False,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order of the files."""
        square, vector = (self.hidden, self.hidden), (self.hidden,)
        up, down = (self.expert_width, self.hidden), (self.hidden, self.expert_width)
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", vector
            yield f"{prefix}.self_attn.k_norm.weight", vector
            yield f"{prefix}.self_attn.q_norm.weight", vector
            for projection in ("k_proj", "o_proj", "q_proj", "v_proj"):
                yield f"{prefix}.self_attn.{projection}.weight", square
            yield f"{prefix}.post_attention_layernorm.weight", vector
            yield f"{prefix}.mlp.gate.weight", (self.experts, self.hidden)
            for expert in range(self.experts):
                yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", down
                yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", up
                yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", up
        yield "model.norm.weight", vector
        yield "lm_head.weight", (self.vocab, self.hidden)


def numel(shape: tuple[int, ...]) -> int:
    """How many numbers a shape holds."""
    count = 1
    for size in shape:
        count *= size
    return count


def draw(name: str, count: int, seed: int) -> Iterator[bytes]:
    """The bf16 bytes of a tensor, block by block."""
    import torch  # who only reads the shape has to stay small

    if name.endswith("norm.weight"):
        yield torch.ones(count, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    std = EMBEDDING_STD if name == "model.embed_tokens.weight" else STD
    for start in range(0, count, BLOCK):
        block = torch.empty(min(BLOCK, count - start)).normal_(0.0, std, generator=generator)
        yield block.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def into_shards(
    tensors: list[tuple[str, tuple[int, ...]]], limit: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Fill shards in order up to ``limit`` bytes."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in tensors:
        size = numel(shape) * BF16_BYTES
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append((name, shape))
        held += size
    return shards


def header_of(tensors: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON padded to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        size = numel(shape) * BF16_BYTES
        table[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], seed: int, fsync: bool
) -> None:
    """One safetensors file, written from front to back."""
    with path.open("wb") as file:
        file.write(header_of(tensors))
        for name, shape in tensors:
            for block in draw(name, numel(shape), seed):
                file.write(block)
        file.flush()
        if fsync:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # the next reader shall find the file on the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(out: Path, shape: Shape, seed: int, shard_bytes: int, threads: int, fsync: bool) -> int:
    """Write the checkpoint, return its bytes of weights. The index comes last."""
    out.mkdir(parents=True)
    tensors = list(shape.tensors())
    shards = into_shards(tensors, shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(write_shard, out / name, shard, seed, fsync)
            for name, shard in zip(names, shards, strict=True)
        ]
        for job, name in zip(jobs, names, strict=True):
            job.result()
            print(f"wrote {name}", file=sys.stderr)

    total = sum(numel(size) for _, size in tensors) * BF16_BYTES
    place = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
    for file in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / file, out / file)
    (out / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", encoding="utf-8")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    (out / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest shard, in 10^9 bytes")
    parser.add_argument("--threads", type=int, default=2, help="shards written at a time")
    parser.add_argument(
        "--fsync", action="store_true", help="wait for the disk, then drop the cache"
    )
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already; name another folder or remove it")
    import torch

    torch.set_num_threads(1)  # the shards are the parallel work
    start = time.perf_counter()
    total = make(
        args.out,
        Shape(layers=args.layers),
        args.seed,
        int(args.shard_gb * 1e9),
        args.threads,
        args.fsync,
    )
    seconds = time.perf_counter() - start
    print(f"{args.out}: {total / 1e9:.2f} GB of weights in {seconds:.0f} s")


if __name__ == "__main__":
    main()
