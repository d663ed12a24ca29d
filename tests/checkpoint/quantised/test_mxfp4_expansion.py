"""MXFP4 is expanded to the bits that transformers gives."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from conmoe_edge.checkpoint.quantised.mxfp4 import expanded

ROWS, BLOCKS = 255, 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_number_under_every_scale(dtype: torch.dtype) -> None:
    """Also where a product is too large for the format, or so small that it has fewer bits or none."""
    values = torch.arange(BLOCKS * 16).remainder(256).to(torch.uint8).expand(ROWS, -1).contiguous()
    scales = torch.arange(ROWS).to(torch.uint8).unsqueeze(1).expand(-1, BLOCKS).contiguous()
    found = expanded(values, scales, dtype)
    blocks = values.view(1, ROWS, BLOCKS, 16)
    wanted = convert_moe_packed_tensors(blocks, scales[None], dtype=dtype)[0].T
    assert found.shape == wanted.shape and found.is_contiguous()
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(whole), wanted.contiguous().view(whole))


def test_rows_and_blocks_keep_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (96, 5 * 16), generator=generator).to(torch.uint8)
    scales = torch.randint(100, 140, (96, 5), generator=generator).to(torch.uint8)
    wanted = convert_moe_packed_tensors(values.view(1, 96, 5, 16), scales[None])[0].T
    assert torch.equal(expanded(values, scales, torch.bfloat16), wanted)
