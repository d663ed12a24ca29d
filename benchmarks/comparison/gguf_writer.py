"""Write a checkpoint of OLMoE's architecture as GGUF, and make its quantised forms.

    LLAMA_PYTHON -m benchmarks.comparison.gguf_writer --model DIR --out model-bf16.gguf
    LLAMA_PYTHON -m benchmarks.comparison.gguf_writer --quantise Q4_K_M --model model-bf16.gguf --out model-q4.gguf

Runs in the environment that has ``gguf`` and ``llama_cpp``; needs neither torch nor transformers.
llama.cpp's own converter refuses tokenizers that it does not know, so the tensors are written here
by its conventions for this architecture: matrices in bf16, norms and the router in fp32, the
experts of a layer in one tensor per projection, nothing permuted. The vocabulary is that of
``tokenizer.json``, padded to the rows of the embedding; what is measured feeds token numbers.

Files appear under their name only when they are whole. Peak memory: one projection of one layer's
experts (268 MB for OLMoE), and the pages of the mapped checkpoint, which the kernel takes back.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

QUANTISED = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
PROJECTIONS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
MATRICES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
IN_FP32 = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
}


class Checkpoint:
    """bf16 tensors of a folder of safetensors files, mapped, by name."""

    def __init__(self, folder: Path) -> None:
        self._place: dict[str, tuple[Path, int, int, tuple[int, ...]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    sys.exit(f"{name} is {entry['dtype']}; only bf16 checkpoints are written here")
                start, end = entry["data_offsets"]
                self._place[name] = (path, 8 + length + start, end - start, tuple(entry["shape"]))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place[name][3]

    def raw(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor's bytes, [..., 2 * columns] uint8."""
        path, start, size, shape = self._place[name]
        data = np.memmap(path, np.uint8, mode="r", offset=start, shape=(size,))
        return data.reshape(*shape[:-1], shape[-1] * 2)

    def fp32(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor's values: a bf16 number is the upper half of an fp32 number."""
        halves = self.raw(name).view(np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the GGUF file and the checkpoint's tensors that it is made of."""

    name: str
    sources: tuple[str, ...]
    in_fp32: bool = False

    def data(self, checkpoint: Checkpoint) -> np.ndarray[Any, Any]:
        if self.in_fp32:
            return checkpoint.fp32(self.sources[0])
        parts = [checkpoint.raw(source) for source in self.sources]
        return parts[0] if len(parts) == 1 else np.stack(parts)


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """All tensors, in the order of the file."""
    yield Tensor("token_embd.weight", ("model.embed_tokens.weight",))
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        for name, source in IN_FP32.items():
            yield Tensor(f"{ours}.{name}", (f"{theirs}.{source}",), in_fp32=True)
        for name, source in MATRICES.items():
            yield Tensor(f"{ours}.{name}", (f"{theirs}.{source}",))
        for name, projection in PROJECTIONS.items():
            yield Tensor(
                f"{ours}.{name}.weight",
                tuple(
                    f"{theirs}.mlp.experts.{expert}.{projection}.weight"
                    for expert in range(config["num_experts"])
                ),
            )
    yield Tensor("output_norm.weight", ("model.norm.weight",), in_fp32=True)
    yield Tensor("output.weight", ("lm_head.weight",))


def add_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The hyperparameters that llama.cpp asks of the architecture ``olmoe``."""
    writer.add_name("olmoe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """The byte-level vocabulary of ``tokenizer.json``; rows without a token get a name only."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = {number: name for name, number in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    words, kinds = [], []
    for number in range(size):
        if number in special:
            words.append(special[number])
            kinds.append(gguf.TokenType.CONTROL)
        elif number in names:
            words.append(names[number])
            kinds.append(gguf.TokenType.NORMAL)
        else:
            words.append(f"[PAD{number}]")
            kinds.append(gguf.TokenType.UNUSED)
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def write(model: Path, out: Path) -> None:
    """The bf16 file of the checkpoint in ``model``."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    checkpoint = Checkpoint(model)
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, "olmoe")
    add_facts(writer, config)
    add_vocabulary(writer, model, config["vocab_size"])
    for tensor in tensors(config):
        shape = checkpoint.shape(tensor.sources[0])
        shape = shape if len(tensor.sources) == 1 else (len(tensor.sources), *shape)
        count = int(np.prod(shape))
        if tensor.in_fp32:
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), count * 4)
        else:
            writer.add_tensor_info(
                tensor.name,
                shape,
                np.dtype(np.float16),  # the two bytes; what they mean is the next argument
                count * 2,
                raw_dtype=gguf.GGMLQuantizationType.BF16,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors(config):
        writer.write_tensor_data(np.ascontiguousarray(tensor.data(checkpoint)))
    writer.close()
    finish(part, out)


def quantise(source: Path, out: Path, kind: str, threads: int) -> None:
    """``source`` in another of llama.cpp's formats, by its own library."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    part = out.with_name(out.name + ".part")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, QUANTISED[kind])
    params.nthread = threads
    failed = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(part), ctypes.byref(params)
    )
    if failed:
        part.unlink(missing_ok=True)
        sys.exit(f"llama_model_quantize ended with {failed}")
    finish(part, out)


def finish(part: Path, out: Path) -> None:
    """The file has come whole to the disk: give it its name."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder, or a GGUF")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quantise", choices=sorted(QUANTISED), help="from a GGUF in bf16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.quantise:
        quantise(args.model, args.out, args.quantise, args.threads)
    else:
        write(args.model, args.out)


if __name__ == "__main__":
    main()
