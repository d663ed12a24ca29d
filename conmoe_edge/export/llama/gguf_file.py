"""A GGUF file, written tensor by tensor.

The header names every tensor with its shape, so the tensors are described first (on the meta device) and come
afterwards, in the same order. Peak memory: the tensors of one portion, and one of them in the format of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from conmoe_edge.errors import UnsupportedModel
from conmoe_edge.export.llama.architecture import Architecture

FLOATS: Mapping[str, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_SUFFIXES = (".weight", ".bias")
_ROUTER = "ffn_gate_inp.weight"


def file_type(dtype: torch.dtype) -> gguf.LlamaFileType:
    """What the file says of itself when its matrices are in ``dtype``."""
    return _TYPES[dtype][1]


class GgufTensors:
    """The tensors of a model as llama.cpp wants them.

    Args:
        architecture: the model's.
        config: its config.
        dtype: of matrices. Vectors, biases and routers are in fp32, as llama.cpp's operators want them.
    """

    def __init__(self, architecture: Architecture, config: Any, dtype: torch.dtype) -> None:
        self._architecture = architecture
        self._config = config
        self._dtype = dtype
        self._names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)

    def name_of(self, name: str) -> str | None:
        """llama.cpp's name of a tensor of the plain checkpoint (experts of a layer in one), where it has one."""
        return self._names.get_name(name, try_suffixes=_SUFFIXES)

    def of(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """One portion of a plain checkpoint -> the name, the tensor (not yet in the format) and its format.

        Raises:
            UnsupportedModel: llama.cpp has no place for one of them.
        """
        for name, tensor in sorted(self._architecture.reshaped(tensors, self._config).items()):
            found = self.name_of(name)
            if found is None:
                raise UnsupportedModel(
                    f"llama.cpp has no place for {name}.",
                    f"its architecture is {gguf.MODEL_ARCH_NAMES[self._architecture.arch]}",
                    "conmoe-edge chat DIR and conmoe-edge serve DIR run the package as it is",
                )
            small = tensor.dim() <= 1 or found.endswith((".bias", _ROUTER))
            yield found, tensor, torch.float32 if small else self._dtype


def describe(
    writer: gguf.GGUFWriter, tensors: GgufTensors, portions: Iterable[Mapping[str, Tensor]]
) -> int:
    """Put all tensors into the header; returns the bytes of their data, padding apart."""
    total = 0
    for portion in portions:
        for name, tensor, dtype in tensors.of(portion):
            nbytes = tensor.numel() * dtype.itemsize
            holder = np.float32 if dtype == torch.float32 else np.float16  # numpy has no bf16
            writer.add_tensor_info(
                name, list(tensor.shape), np.dtype(holder), nbytes, raw_dtype=_TYPES[dtype][0]
            )
            total += nbytes
    return total


def write_portion(
    writer: gguf.GGUFWriter, tensors: GgufTensors, portion: Mapping[str, Tensor]
) -> None:
    """Write the data of one portion.

    Raises:
        UnsupportedModel: a number is too large for fp16.
    """
    for name, tensor, dtype in tensors.of(portion):
        stored = tensor.to(dtype).contiguous()
        if dtype == torch.float16 and not bool(stored.isfinite().all()):
            raise UnsupportedModel(
                f"{name} holds numbers that fp16 cannot.", "they end at 65,504", "--outtype bf16"
            )
        data = stored.view(torch.int16).numpy() if dtype != torch.float32 else stored.numpy()
        writer.write_tensor_data(data)


def open_writer(path: Path, architecture: Architecture) -> gguf.GGUFWriter:
    """A writer of the file ``path``; nothing is written yet."""
    return gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture.arch])
