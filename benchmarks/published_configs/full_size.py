"""A checkpoint of full size with headers and no numbers: sparse files, which take no room on the disk."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.published_configs.build import build, checkpoint_shapes, knows

_SHARD_BYTES = 5_000_000_000
_CODES = {"BF16": 16, "F8_E4M3": 8, "F32": 32, "U8": 8}
_BLOCK, _MX_BLOCK = 128, 32
# What the publishers of FP8 checkpoints leave in bf16, apart from what is no matrix.
_NEVER_FP8 = re.compile(
    r"embed|lm_head|^head|norm|\.gate\.|router|vision|visual|conv|patch|shared_head"
)


class Header(NamedTuple):
    """Of one tensor: the code of its number format, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * _CODES[self.dtype] // 8


class Written(NamedTuple):
    """How many tensors, and their bytes."""

    tensors: int
    nbytes: int
    form: str


def write_headers(config: dict[str, Any], folder: Path) -> Written:
    """Write ``config.json`` and the shards of the model into the new ``folder``."""
    folder.mkdir(parents=True)
    config, method, written_as = _declared(config)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if knows(config):
        shapes = checkpoint_shapes(build(config, torch.bfloat16, "meta"))
    else:  # refused by its kind, whatever the tensors are
        shapes = {"model.embed_tokens.weight": (8, 8)}
    headers = _stored(shapes, method)
    shards: list[dict[str, Header]] = [{}]
    filled = 0
    for name, one in headers.items():
        if filled >= _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = one
        filled += one.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        _write_shard(folder / file, shard)
    total = sum(one.nbytes for one in headers.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Written(len(headers), total, written_as)


def _declared(config: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """The config to write, the form of its weights, and what the table says of it. Forms whose tensors are not written
    here (packed integers, NVFP4) become bf16, and nothing declares them then.
    """
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    declared = config.get("quantization_config") or inner.get("quantization_config") or {}
    method = str(declared.get("quant_method", "plain"))
    if method in ("plain", "fp8", "mxfp4"):
        return config, method, method
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if inner:
        plain["text_config"] = {k: v for k, v in inner.items() if k != "quantization_config"}
    return plain, "plain", f"bf16 ({method} as published)"


def _stored(shapes: dict[str, tuple[int, ...]], method: str) -> dict[str, Header]:
    """The tensors in that form."""
    headers: dict[str, Header] = {}
    for name, shape in shapes.items():
        if method == "fp8" and len(shape) == 2 and not _NEVER_FP8.search(name):
            headers[name] = Header("F8_E4M3", shape)
            grid = (-(-shape[0] // _BLOCK), -(-shape[1] // _BLOCK))
            headers[f"{name}_scale_inv"] = Header("F32", grid)
        elif method == "mxfp4" and len(shape) == 3 and "experts" in name:
            experts, wide, rows = shape
            blocks = (experts, rows, wide // _MX_BLOCK)
            headers[f"{name}_blocks"] = Header("U8", (*blocks, _MX_BLOCK // 2))
            headers[f"{name}_scales"] = Header("U8", blocks)
        else:
            headers[name] = Header("BF16", shape)
    return headers


def _write_shard(path: Path, tensors: dict[str, Header]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, one in tensors.items():
        places = [end, end + one.nbytes]
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": places}
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
