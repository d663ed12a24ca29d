"""Small quantised checkpoints that the libraries themselves have packed, for tests/data/quantised.

    python tools/make_quantised_fixtures.py DIR [KIND ...]

runs in an environment of its own: transformers 5.24, compressed-tensors 0.20, gptqmodel 7.7, autoawq 0.2.9, auto-gptq
0.7.1, auto-round 0.16 (the four without their dependencies), all on a processor. For the order of columns in
compressed-tensors, which its newer releases no longer write, ``CT_OLD`` names a folder with release 0.9.4
(``pip install --no-deps --target``).

A kind is a folder with config.json, model.safetensors and reference.json: of every quantised weight the SHA-256 of the
bytes that its library expands it to, in the format of the model. Same seeds, same bytes. Peak memory: under 1 GB.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GROUP = 32
Packed = tuple[dict[str, Tensor], Tensor]
"""The tensors of a layer by the ends of their names, and the weight [R, C] that the library makes of them."""


def tiny(folder: Path, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """A random Qwen3-MoE as transformers writes it, its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model("qwen3_moe", **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2:
                spread = 0.5 if "embed" in name else 0.08
                parameter.normal_(0.0, spread, generator=drawn)
    model.to(dtype).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write(
    folder: Path,
    pack: Callable[[str, Tensor], Packed],
    settings: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    beside: str = "",
    seed: int = 11,
) -> None:
    """All linear layers but router and head in the form of ``pack``; ``beside`` is the file that declares it."""
    tensors = tiny(folder, dtype, seed)
    reference = {}
    for name in [one for one in sorted(tensors) if one.endswith("_proj.weight")]:
        parts, weight = pack(name, tensors.pop(name))
        base = name.removesuffix("weight")
        tensors |= {base + part: one.contiguous() for part, one in parts.items()}
        reference[name] = digest(weight.to(dtype))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    declare(folder, settings, beside)
    (folder / "reference.json").write_text(json.dumps(reference, indent=0) + "\n")


def declare(folder: Path, settings: dict[str, Any], beside: str = "") -> None:
    """Say in config.json, or in the file ``beside`` it, how the weights are stored."""
    if beside:
        (folder / beside).write_text(json.dumps(settings, indent=1))
    else:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "quantization_config": settings}, indent=1))
    (folder / "generation_config.json").unlink(missing_ok=True)


def digest(weight: Tensor) -> str:
    """SHA-256 of the numbers as they lie in memory, and their format and shape."""
    data = weight.contiguous().view(torch.uint8).numpy().tobytes()
    shape = "x".join(map(str, weight.shape))
    return f"{str(weight.dtype).removeprefix('torch.')} {shape} {hashlib.sha256(data).hexdigest()}"


def multiplied_by(layer: nn.Module, columns: int) -> Tensor:
    """The matrix [C, R] that a layer of fp16 has expanded when it multiplies by it."""
    seen, multiply = [], torch.matmul
    try:
        torch.matmul = lambda left, right: (seen.append(right), multiply(left, right))[1]
        with torch.no_grad():
            layer(torch.ones(1, columns, dtype=torch.float16))
    finally:
        torch.matmul = multiply
    (found,) = seen
    return found


# compressed-tensors


def compressed(folder: Path, layout: str, **weights: Any) -> None:
    """By the library's own compressor of ``layout``."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(layout)

    def pack(_: str, weight: Tensor) -> Packed:
        grouped = {
            "group": weight.unflatten(1, (-1, args.group_size or 1)),
            "channel": weight.unsqueeze(1),
            "tensor": weight.reshape(1, 1, -1),
        }[args.strategy]
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        parts = compressor.compress(state, scheme)
        return parts, compressor.decompress(parts, scheme)["weight"]

    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "format": layout}
    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {"group_0": group},
    }
    write(folder, pack, settings)


def ordered_by_activation(folder: Path) -> None:
    """Columns in the order of their activations, by release 0.9.4 in a process of its own."""
    old = os.environ.get("CT_OLD")
    if not old:
        raise SystemExit("CT_OLD names no folder with compressed-tensors 0.9.4")
    environment = {**os.environ, "PYTHONPATH": old, "CT_OLD": ""}
    subprocess.run(
        [sys.executable, __file__, str(folder.parent), f"old:{folder.name}"],
        check=True,
        env=environment,
    )


def _ordered_by_activation(folder: Path) -> None:
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import (
        PackedQuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationArgs

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP // 2, actorder="group")
    compressor = PackedQuantizationCompressor()
    drawn = torch.Generator().manual_seed(7)

    def pack(_: str, weight: Tensor) -> Packed:
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=drawn)
        index = torch.empty(columns, dtype=torch.int32)
        index[order] = (torch.arange(columns) // args.group_size).int()
        grouped = weight[:, order].unflatten(1, (-1, args.group_size))
        scale = (grouped.abs().amax(-1) / 7.5).to(weight.dtype)
        zero = torch.zeros_like(scale, dtype=torch.int8)
        parts = compressor.compress_weight(weight, scale, args, zero, index)
        parts |= {"weight_scale": scale, "weight_g_idx": index}
        expanded = compressor.decompress_weight(parts, args)
        return parts, expanded

    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    write(folder, pack, settings)


# GPTQ


def grid(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points fp32 [R, G], as GPTQ finds them by rounding alone."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    top = (1 << bits) - 1
    scale = (high - low) / top
    zero = torch.full_like(scale, (top + 1) / 2) if symmetric else (-low / scale).round()
    return scale.half().float(), zero.clamp(0, top)


def linear(weight: Tensor) -> nn.Linear:
    """A layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.float()
    return layer


def gptqmodel(
    folder: Path,
    bits: int,
    version: str = "gptq",
    symmetric: bool = True,
    ordered: bool = False,
    beside: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """By GPTQModel's packer; the reference is its own expansion after it has read the file's zero points."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    drawn = torch.Generator().manual_seed(7)
    config = QuantizeConfig(
        bits=bits, group_size=GROUP, sym=symmetric, desc_act=ordered, format=FORMAT(version),
        quant_method=METHOD.GPTQ,
    )  # fmt: skip

    def pack(_: str, weight: Tensor) -> Packed:
        rows, columns = weight.shape
        order = torch.randperm(columns, generator=drawn) if ordered else torch.arange(columns)
        index = torch.empty(columns, dtype=torch.int32)
        index[order] = (torch.arange(columns) // GROUP).int()
        scale, zero = grid(weight[:, order], bits, GROUP, symmetric)
        layer = TorchLinear(bits, GROUP, symmetric, ordered, columns, rows)
        layer.pack_original(linear(weight), scale, zero, index)
        layer.qzero_format(format=2)
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, config)
        names = ("qweight", "qzeros", "scales", "g_idx")
        parts = {name: getattr(layer, name).clone() for name in names}
        if version == "gptq":
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        layer.eval()
        layer.post_init()
        return parts, TorchLinear.dequantize_weight(layer).T

    settings = {
        "bits": bits,
        "group_size": GROUP,
        "sym": symmetric,
        "desc_act": ordered,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    write(folder, pack, settings, dtype, beside)


def autogptq(folder: Path) -> None:
    """By AutoGPTQ's packer: not symmetric, columns in an order of their own, declared beside config.json."""
    _bare("auto_gptq", "nn_modules", "nn_modules.qlinear")
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    drawn = torch.Generator().manual_seed(7)

    def pack(_: str, weight: Tensor) -> Packed:
        rows, columns = weight.shape
        order = torch.randperm(columns, generator=drawn)
        index = torch.empty(columns, dtype=torch.int32)
        index[order] = (torch.arange(columns) // GROUP).int()
        scale, zero = grid(weight[:, order], 4, GROUP, False)
        layer = QuantLinear(4, GROUP, columns, rows, bias=False)
        layer.pack(linear(weight).half(), scale, zero.clamp(min=1).clone(), index)
        parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        return parts, multiplied_by(layer, columns).T

    settings = {
        "bits": 4,
        "group_size": GROUP,
        "damp_percent": 0.01,
        "desc_act": True,
        "static_groups": False,
        "sym": False,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": None,
    }
    write(folder, pack, settings, torch.float16, "quantize_config.json")


def _bare(package: str, *inner: str) -> None:
    """Make parts of a package importable without its own imports, which need older libraries."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed")
    for name in (package, *(f"{package}.{one}" for one in inner)):
        module = types.ModuleType(name)
        within = name.split(".")[1:]
        module.__path__ = [str(Path(spec.submodule_search_locations[0], *within))]
        sys.modules[name] = module


# AWQ


def autoawq(folder: Path, version: str, beside: str = "") -> None:
    """By AutoAWQ's packer; the reference is its own expansion, for gemv that of its grid."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm

    def pack(_: str, weight: Tensor) -> Packed:
        scale, zero = grid(weight, 4, GROUP, False)
        step, middle = (one.repeat_interleave(GROUP, 1) for one in (scale, zero))
        # AutoAWQ rounds a layer before it packs it; a number that is out of range would go into the next one's bits.
        number = (weight.float() / step + middle).round().clamp(0, 15)
        layer = linear((number - middle) * step)
        gemm = WQLinear_GEMM.from_linear(
            layer, 4, GROUP, scales=scale.T.contiguous(), zeros=zero.T.contiguous()
        )
        expanded = dequantize_gemm(gemm.qweight, gemm.qzeros, gemm.scales, 4, GROUP).T
        if version == "gemv":
            gemm = WQLinear_GEMV.from_linear(layer, 4, GROUP, scales=scale, zeros=zero)
        parts = {"qweight": gemm.qweight, "qzeros": gemm.qzeros, "scales": gemm.scales}
        return parts, expanded

    settings = {"zero_point": True, "version": version.upper() if beside else version}
    if beside:
        settings |= {"q_group_size": GROUP, "w_bit": 4}
    else:
        settings |= {"group_size": GROUP, "bits": 4, "quant_method": "awq"}
        settings["modules_to_not_convert"] = ["gate"]
    write(folder, pack, settings, torch.float16, beside)


# auto-round


def auto_round(folder: Path, layout: str, bits: int, symmetric: bool) -> None:
    """All of it by auto-round: it reads a model, rounds it and writes it."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as work:
        source, out = Path(work) / "source", Path(work) / "out"
        tiny(source, torch.bfloat16, 11)
        tokenizer(source)
        run = AutoRound(
            str(source), AutoTokenizer.from_pretrained(source), bits=bits, group_size=GROUP,
            sym=symmetric, iters=0, disable_opt_rtn=True, device_map="cpu",
        )  # fmt: skip
        run.quantize_and_save(str(out), format=layout)
        print(sorted(one.name for one in out.rglob("*")))
        folder.mkdir(parents=True, exist_ok=True)
        (found,) = out.rglob("model.safetensors")
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(found.parent / name, folder / name)
    tensors, reference = load_file(folder / "model.safetensors"), {}
    config = json.loads((folder / "config.json").read_text())
    for name in [one for one in sorted(tensors) if one.endswith(".qweight")]:
        base = name.removesuffix("qweight")
        parts = {one: tensors[base + one] for one in ("qweight", "qzeros", "scales")}
        weight = expand_auto_round(parts, config["quantization_config"])
        reference[f"{base}weight"] = digest(weight.to(getattr(torch, config["dtype"])))
    (folder / "reference.json").write_text(json.dumps(reference, indent=0) + "\n")


def expand_auto_round(parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """What auto-round's own layer of that packing multiplies by."""
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    bits, packing = settings["bits"], settings["packing_format"]
    if "awq" in packing:
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        return dequantize_gemm(
            *(parts[one] for one in ("qweight", "qzeros", "scales")), bits, GROUP
        ).T
    module = qlinear_torch_zp if packing == "auto_round:auto_gptq" else qlinear_torch
    columns, rows = parts["qweight"].shape[0] * 32 // bits, parts["scales"].shape[1]
    layer = module.QuantLinear(bits, GROUP, columns, rows, bias=False)
    layer.load_state_dict(parts, strict=False)
    return multiplied_by(layer, columns).T


def tokenizer(folder: Path) -> None:
    """Single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(chr(code) for code in range(33, 33 + 92))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {
    "ct-w4-group": lambda out: compressed(
        out, "pack-quantized", num_bits=4, strategy="group", group_size=GROUP
    ),
    "ct-w4-group-asym": lambda out: compressed(
        out, "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    "ct-w4-actorder": ordered_by_activation,
    "ct-w8-channel-asym": lambda out: compressed(
        out, "pack-quantized", num_bits=8, strategy="channel", symmetric=False
    ),
    "ct-w3-tensor-asym": lambda out: compressed(
        out, "pack-quantized", num_bits=3, strategy="tensor", symmetric=False
    ),
    "ct-int8-channel": lambda out: compressed(out, "int-quantized", num_bits=8, strategy="channel"),
    "ct-int8-tensor-asym": lambda out: compressed(
        out, "int-quantized", num_bits=8, strategy="tensor", symmetric=False
    ),
    "gptq-w4": lambda out: gptqmodel(out, 4),
    "gptq-w2-v2-asym": lambda out: gptqmodel(out, 2, "gptq_v2", symmetric=False),
    "gptq-w3-asym": lambda out: gptqmodel(out, 3, symmetric=False),
    "gptq-w4-v1-asym": lambda out: gptqmodel(out, 4, symmetric=False),
    "gptq-w8-v2-desc": lambda out: gptqmodel(out, 8, "gptq_v2", ordered=True, dtype=torch.bfloat16),
    "gptq-w4-desc-asym": autogptq,
    "awq-gemm": lambda out: autoawq(out, "gemm"),
    "awq-gemv": lambda out: autoawq(out, "gemv", "quant_config.json"),
    "auto-round-gptq": lambda out: auto_round(out, "auto_round:auto_gptq", 4, True),
    "auto-round-own": lambda out: auto_round(out, "auto_round", 2, False),
    "auto-round-awq": lambda out: auto_round(out, "auto_round:auto_awq", 4, False),
}


def main() -> None:
    root, *kinds = sys.argv[1:]
    for kind in kinds or KINDS:
        folder = Path(root) / kind.removeprefix("old:")
        folder.mkdir(parents=True, exist_ok=True)
        if kind.startswith("old:"):
            _ordered_by_activation(folder)
        else:
            KINDS[kind](folder)
        size = sum(one.stat().st_size for one in folder.iterdir())
        print(f"{kind}: {size} bytes")


if __name__ == "__main__":
    main()
