"""Write the tiny quantised checkpoints of ``tests/data/quantised``, each with its own tool, and what that tool expands
them to.

    python tools/make_quantised_float_fixtures.py [KIND ...]

It needs ``compressed-tensors``, ``nvidia-modelopt`` and ``bitsandbytes`` (the versions are written into
``made_by.json`` of each), which are no dependencies of the project but for the last: run it in an environment of its
own. Every number comes from a seed. Each folder has ``config.json``, ``model.safetensors`` and
``expanded.safetensors``: the quantised tensors alone, in bf16, under the names of a plain checkpoint.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).resolve().parents[1] / "tests" / "data" / "quantised"
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CLASSES = {"qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}
State = dict[str, Tensor]


def model(kind: str = "qwen3_moe") -> Any:
    """A random model in bf16."""
    more = {"sliding_window": 8} if kind == "gpt_oss" else {}
    config = AutoConfig.for_model(kind, **SIZES, **more)
    config.architectures = [CLASSES[kind]]
    config.dtype = "bfloat16"
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            if parameter.dim() >= 2:
                spread = 0.5 if "embed" in name else 0.08
                parameter.normal_(0.0, spread, generator=drawn)
    return made.to(torch.bfloat16).eval()


def is_linear(name: str) -> bool:
    """A weight that the tools quantise: all projections, neither the router nor the head."""
    return name.endswith("_proj.weight")


def plain(made: Any, folder: Path) -> State:
    """Its tensors as ``save_pretrained`` writes them."""
    made.save_pretrained(folder)
    return {name: one.clone() for name, one in load_file(folder / "model.safetensors").items()}


def write(folder: Path, stored: State, expanded: State, declared: Any, made_by: str) -> None:
    """The files of one kind, over the plain model that is in ``folder``."""
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    expanded = {name: one.contiguous() for name, one in expanded.items()}
    save_file(expanded, folder / "expanded.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if declared is not None:
        config["quantization_config"] = declared
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    said = {"tool": made_by, "version": version(made_by), "torch": version("torch")}
    (folder / "made_by.json").write_text(json.dumps(said, indent=1) + "\n")


def compressed(strategy: dict[str, Any], form: str) -> Callable[[Path], None]:
    """compressed-tensors: scales of the largest values, its own ``compress``, its own ``decompress``."""

    def make(folder: Path) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        weights = QuantizationArgs(**strategy)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = plain(model(), folder)
        expanded = {}
        for name in [one for one in stored if is_linear(one)]:
            weight, base = stored.pop(name), name.removesuffix("weight")
            state: State = {"weight": weight}
            low, high = _extremes(weight.float(), weights)
            outer = None
            if weights.strategy == "tensor_group":
                outer = generate_gparam(weight.float().min(), weight.float().max())
                state["weight_global_scale"] = outer
            scale, _ = calculate_qparams(low, high, weights, global_scale=outer)
            state["weight_scale"] = scale
            packed = compressor.compress(state, scheme)
            stored.update({base + part: tensor.detach() for part, tensor in packed.items()})
            back = compressor.decompress(dict(packed), scheme)
            expanded[name] = back["weight"].detach().to(torch.bfloat16)
        settings = QuantizationConfig(
            config_groups={"group_0": scheme},
            quant_method="compressed-tensors",
            format=form,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=["lm_head", "re:.*mlp.gate$"],
        )
        declared = json.loads(settings.model_dump_json())
        write(folder, stored, expanded, declared, "compressed-tensors")

    return make


def _extremes(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """The least and the largest value of every part that has a scale of its own."""
    if args.strategy in ("group", "tensor_group"):
        parts = weight.unflatten(-1, (-1, args.group_size))
        return parts.amin(-1), parts.amax(-1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return weight.min(), weight.max()


def modelopt(kind: str, settings: str, cache: bool = False) -> Callable[[Path], None]:
    """NVIDIA's Model Optimizer: calibrated on random tokens, exported by its own function."""

    def make(folder: Path) -> None:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        made = model(kind)
        ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1))
        chosen = getattr(mtq, settings)
        if cache:
            chosen = mtq.update_quant_cfg_with_kv_cache_quant(chosen, mtq.FP8_KV_CFG["quant_cfg"])
        mtq.quantize(made, chosen, lambda one: one(ids))
        export_hf_checkpoint(made, dtype=torch.bfloat16, export_dir=folder)
        stored = load_file(folder / "model.safetensors")
        expanded = {}
        for name, tensor in stored.items():
            if tensor.dtype == torch.uint8:
                expanded[name] = _nvfp4(name, stored)
            elif tensor.dtype == torch.float8_e4m3fn and name.endswith(".weight"):
                expanded[name] = _fp8(name, stored)
        config = json.loads((folder / "config.json").read_text())
        write(folder, stored, expanded, config["quantization_config"], "nvidia-modelopt")

    return make


def _nvfp4(name: str, stored: State) -> Tensor:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    base = name if name.endswith(".weight") else f"{name}_weight"
    packed, scale, outer = stored[name], stored[f"{base}_scale"], stored[f"{base}_scale_2"]
    if turned := packed.dim() == 3:
        # Its export packs the transposed matrices of gpt-oss and turns both parts around.
        packed, scale = packed.mT.contiguous(), scale.mT.contiguous()
    shape = torch.Size((*packed.shape[:-1], 2 * packed.shape[-1]))
    whole = NVFP4QTensor(shape, torch.bfloat16, packed)
    back = whole.dequantize(
        dtype=torch.bfloat16, scale=scale, double_scale=outer, block_sizes={-1: 16}
    )
    return back.mT if turned else back


def _fp8(name: str, stored: State) -> Tensor:
    from modelopt.torch.quantization.qtensor import FP8QTensor

    tensor = stored[name]
    whole = FP8QTensor(tensor.shape, torch.float32, tensor)
    back = whole.dequantize(dtype=torch.float32, scale=stored[f"{name}_scale"])
    return back.to(torch.bfloat16)


def bitsandbytes(kind: str, nested: bool = False) -> Callable[[Path], None]:
    """bitsandbytes: every projection as a linear layer of its own, as transformers 4 wrote experts too."""

    def make(folder: Path) -> None:
        import bitsandbytes as bnb
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

        stored = plain(model(), folder)
        expanded = {}
        for name in [one for one in stored if is_linear(one)]:
            weight, base = stored.pop(name), name.removesuffix("weight")
            rows, columns = weight.shape
            if kind == "int8":
                layer: Any = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(
                    weight, requires_grad=False, has_fp16_weights=False
                )
                layer = layer.to("cpu")
                state = layer.state_dict()
                back = int8_vectorwise_dequant(state["weight"], state["SCB"])
            else:
                layer = bnb.nn.Linear4bit(
                    columns, rows, bias=False, quant_type=kind, compress_statistics=nested
                )
                layer.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type=kind, compress_statistics=nested
                )
                layer = layer.to("cpu")
                state = layer.state_dict()
                # Whole blocks as rows: for shorter ones the library's AVX-512 kernel takes another block's largest
                # value (0.50.2).
                known = layer.weight.quant_state
                shape, known.shape = (
                    known.shape,
                    torch.Size((weight.numel() // known.blocksize, known.blocksize)),
                )
                back = dequantize_4bit(layer.weight.data, known).view(shape)
                known.shape = shape
            stored.update({base + part: one.detach().clone() for part, one in state.items()})
            expanded[name] = back.to(torch.bfloat16)
        declared = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": kind != "int8",
            "load_in_8bit": kind == "int8",
            "bnb_4bit_quant_type": kind if kind != "int8" else "fp4",
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": None,
        }
        write(folder, stored, expanded, declared, "bitsandbytes")

    return make


FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
KINDS: dict[str, Callable[[Path], None]] = {
    "nvfp4-modelopt": modelopt("qwen3_moe", "NVFP4_DEFAULT_CFG", cache=True),
    "nvfp4-modelopt-stacked": modelopt("gpt_oss", "NVFP4_DEFAULT_CFG"),
    "nvfp4-compressed-tensors": compressed(
        {**FP4, "strategy": "tensor_group", "group_size": 16}, "nvfp4-pack-quantized"
    ),
    "mxfp4-compressed-tensors": compressed(
        {**FP4, "strategy": "group", "group_size": 32}, "mxfp4-pack-quantized"
    ),
    "mxfp8-compressed-tensors": compressed(
        {**FP8, "strategy": "group", "group_size": 32}, "mxfp8-quantized"
    ),
    "fp8-compressed-tensors": compressed({**FP8, "strategy": "channel"}, "float-quantized"),
    "fp8-modelopt": modelopt("qwen3_moe", "FP8_DEFAULT_CFG", cache=True),
    "bitsandbytes-nf4-nested": bitsandbytes("nf4", nested=True),
    "bitsandbytes-fp4": bitsandbytes("fp4"),
    "bitsandbytes-int8": bitsandbytes("int8"),
}


def main(kinds: list[str]) -> None:
    """Write the named kinds, by default all of them."""
    for kind in kinds or list(KINDS):
        folder = OUT / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        KINDS[kind](folder)
        size = sum(one.stat().st_size for one in folder.iterdir())
        print(f"{kind}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
