"""All that keys and values of a prompt depend on beside its tokens, in one text.

What is kept on a disk is used again only where this text is the same: the package and its files, formats, the chunk,
the device, and whatever computes: this program's own source, torch, transformers, the operator as it was compiled, the
processor. One too many costs a prompt that is computed again; one too few would be a wrong answer without an error.

Memory: a file of source. Raises ``PackageError`` where the package cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from conmoe_edge.checkpoint.format.manifest import MANIFEST_NAME
from conmoe_edge.checkpoint.fs.contained import path_inside, read_inside
from conmoe_edge.offload.kernels.cpu.bindings import operator_library
from conmoe_edge.offload.kernels.cpu.processor import processor
from conmoe_edge.offload.runtime import Runtime

FORMAT = 1
"""Of the files; another number means other files."""
_SOURCE = ("compat.py", "model", "offload", "integrations")
"""What of this program computes, below its folder."""
_VARIABLES = ("ONEDNN_", "DNNL_", "ATEN_", "MKL_", "OPENBLAS_", "CONMOE_")
"""Beginnings of environment variables that may choose other kernels."""
_SECRET = ("CONMOE_API_KEY",)


def prompt_identity(model: Any) -> str:
    """For a loaded package, as JSON with sorted keys."""
    runtime: Runtime = model.conmoe
    compiled = operator_library()
    value = {
        "format": FORMAT,
        "package": _package(runtime.folder),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "kv_precision": runtime.kv_precision,
        "chunk": runtime.prefill_chunk,
        "device": _device(runtime.device),
        "misses": runtime.misses,
        "kernel": runtime.backend.name,
        "operator": "" if compiled is None else compiled.path.stem,
        "fast_path": "" if runtime.fast_path is None else runtime.fast_path.summary,
        "source": _source(),
        "versions": {name: version(name) for name in ("torch", "transformers", "conmoe-edge")},
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        # Sums in fp32 are divided by the threads.
        "threads": 0 if model.dtype == torch.bfloat16 else torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_VARIABLES) and name not in _SECRET
        },
    }
    return json.dumps(value, sort_keys=True)


def _package(folder: Path) -> dict[str, Any]:
    """The manifest, which has the digests of the package's files, and what tells whether these were exchanged."""
    found: dict[str, Any] = {
        name: hashlib.sha256(read_inside(folder, name)).hexdigest()
        for name in (MANIFEST_NAME, "config.json")
    }
    for name in sorted(one.name for one in folder.iterdir() if one.suffix == ".safetensors"):
        info = path_inside(folder, name).stat()
        found[name] = [info.st_size, info.st_mtime_ns]
    return found


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"


def _source() -> str:
    home = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for part in _SOURCE:
        top = home / part
        files = [top] if top.is_file() else [one for one in top.rglob("*") if one.is_file()]
        for one in sorted(files):
            if one.suffix in (".py", ".cpp", ".h"):
                digest.update(f"{one.relative_to(home)}\n".encode())
                digest.update(one.read_bytes())
    return digest.hexdigest()
