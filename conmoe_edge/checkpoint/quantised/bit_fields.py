"""Numbers of 2 to 8 bits that lie one behind the other in int32 words, the first in the lowest bits.

Number i takes the bits from i * bits on, across the end of a word where the width does not divide 32.
compressed-tensors, GPTQ and AWQ all pack so, along one axis or the other. Source: the packers of those libraries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def words_of(count: int, bits: int) -> int:
    """Words that ``count`` numbers take."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` numbers of each row of ``words`` int32 [R, W], as uint8 [R, count].

    Peak memory: the result, four bytes a number where a width does not divide 8.
    """
    data = words.contiguous().view(
        torch.uint8
    )  # little-endian, as every machine that torch runs on here
    rows = data.shape[0]
    if bits == 8:
        return data[:, :count]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        numbers = (data.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
        return numbers.view(rows, -1)[:, :count]
    data = torch.nn.functional.pad(data, (0, 1))
    out = torch.empty(rows, count, dtype=torch.uint8)
    start = torch.arange(count, dtype=torch.int32) * bits
    byte, shift = start // 8, (start % 8).to(torch.int16)
    for number, row in enumerate(data):  # a row at a time: this way takes two wider copies
        pair = row[byte].to(torch.int16) | (row[byte + 1].to(torch.int16) << 8)
        out[number] = ((pair >> shift) & ((1 << bits) - 1)).to(torch.uint8)
    return out
