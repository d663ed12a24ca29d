"""Keys and values in 8 bits: the form, against a transcription number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conmoe_edge.model.kv_rows import BLOCK, pack_rows, row_bytes, unpack_rows

FORMATS = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [1, 8, 31, 32, 33, 64, 72, 80, 96, 128, 576]


def _numbers(dtype: torch.dtype, width: int) -> Tensor:
    """Rows of all sizes, zeros and the least and greatest numbers of the format among them."""
    generator = torch.Generator().manual_seed(width)
    sizes = torch.randint(-40, 13, (2, 3, 5, 1), generator=generator).float().exp2()
    found = (torch.randn(2, 3, 5, width, generator=generator) * sizes).to(dtype)
    found[0, 0, 0] = 0
    found[0, 0, 1, 0] = torch.finfo(dtype).max
    found[0, 0, 2] = torch.finfo(dtype).smallest_normal
    found[0, 0, 3] = -torch.finfo(dtype).max
    return found


def _by_hand(row: list[float], least: int) -> list[float]:
    """A row as it is read again."""
    found = []
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        greatest = max(abs(one) for one in block)
        step = max(math.frexp(greatest)[1] - 7 if greatest else least, least)
        whole = [max(-127, min(127, round(math.ldexp(one, -step)))) for one in block]
        found += [math.ldexp(one, step) for one in whole]
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_numbers_come_back_as_by_hand(dtype: torch.dtype, width: int) -> None:
    numbers = _numbers(dtype, width)
    rows = pack_rows(numbers)
    assert rows.dtype == torch.int8 and rows.shape == (2, 3, 5, row_bytes(width))
    found = unpack_rows(rows, width, dtype)
    least = -24 if dtype == torch.float16 else -126
    wanted = [_by_hand(row, least) for row in numbers.double().view(-1, width).tolist()]
    assert torch.equal(found.double().view(-1, width), torch.tensor(wanted, dtype=torch.float64))
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_read_is_exact_in_every_format_and_packs_to_the_same_row(
    dtype: torch.dtype,
) -> None:
    rows = pack_rows(_numbers(dtype, 80))
    found = unpack_rows(rows, 80, dtype)
    assert torch.equal(unpack_rows(rows, 80, torch.float32), found.float())
    assert torch.equal(pack_rows(found), rows)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_no_number_stays_none(dtype: torch.dtype, broken: float) -> None:
    numbers = _numbers(dtype, 80)
    numbers[1, 2, 4, 70] = broken
    found = unpack_rows(pack_rows(numbers), 80, dtype)
    assert found[1, 2, 4, 64:].isnan().all(), "its block"
    assert int(found.isnan().sum()) == 16, "and no other"


def test_views_of_other_orders_are_packed_as_their_copies() -> None:
    numbers = torch.randn(1, 7, 3, 48).bfloat16().transpose(1, 2)
    rows = pack_rows(numbers)
    assert torch.equal(rows, pack_rows(numbers.contiguous()))
    wider = torch.cat([rows, rows], -2)[:, :, 2:9]
    assert torch.equal(
        unpack_rows(wider, 48, torch.bfloat16),
        unpack_rows(wider.contiguous(), 48, torch.bfloat16),
    )
