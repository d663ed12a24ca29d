"""From the code of a number format in a safetensors header to torch's dtype."""

from __future__ import annotations

import torch

from conmoe_edge.checkpoint.format.dtypes import TORCH_NAMES
from conmoe_edge.errors import CheckpointError


def torch_dtype(code: str, tensor: str = "") -> torch.dtype:
    """The ``torch.dtype`` of a code in a header.

    Raises:
        CheckpointError: torch has no such format; ``tensor`` is named in the message.
    """
    dtype = getattr(torch, TORCH_NAMES.get(code, ""), None)
    if dtype is None:
        raise CheckpointError(
            f"The tensor {tensor!r} is stored as {code}.",
            f"This version of torch ({torch.__version__}) has no such number format.",
            "Use the checkpoint in bf16, fp16 or fp32.",
        )
    return dtype
