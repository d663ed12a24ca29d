"""The GPU's kernels without a GPU: Triton's interpreter runs them on tensors in the memory of the processor.

``tests/conftest.py`` turns it on before anything imports Triton, where there is no GPU.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch

from conmoe_edge.offload.kernels.triton.launch import GpuOperator

CPU = torch.device("cpu")


@cache
def interpreted_operator() -> GpuOperator:
    """An operator for the processor. Skips where there is no Triton, or a GPU for which it compiles."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("here Triton compiles for the GPU")
    from conmoe_edge.offload.kernels.triton import triton_kernels as kernels

    return GpuOperator(kernels, CPU)
