"""A few numbers of rows for products in 16 bits on a CPU, so that oneDNN keeps few kernels.

torch multiplies bf16 matrices with oneDNN, which makes code for every shape it meets and keeps it: about 650 KiB a
shape (oneDNN 3.x on avx512-bf16, 32 to 1,024 columns, measured), of which 400 KiB for as long as the process lives,
whatever ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` says. How many tokens of a prompt's last chunk there are, and how many of
them an expert gets, is any number up to the chunk: with seven kinds of matrices and chunks of 512 that comes to more
than a GiB beside every plan. Rows of zeros up to the next of ``STEPS`` keep it to some 40 MiB.

The number of rows that a product is made with follows from its tokens alone, so memory changes nothing. Memory: the
padded rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512)
"""At most twice as many, where reading and expanding the weights is what takes time, then half as many again; beyond
the last its multiples."""


def steady(rows: int) -> int:
    """The number of rows that a product of ``rows`` rows is made with."""
    for step in STEPS:
        if rows <= step:
            return step
    return -(-rows // STEPS[-1]) * STEPS[-1]


def padded(x: Tensor) -> Tensor:
    """[n, K] -> [``steady(n)``, K] with zeros below; ``x`` itself where nothing is to be added, or where another
    library multiplies: another device, more than 16 bits."""
    rows = x.shape[0]
    more = steady(rows) - rows if rows and x.dtype.itemsize == 2 and x.device.type == "cpu" else 0
    if not more:
        return x
    wide = torch.empty(rows + more, x.shape[1], dtype=x.dtype)
    wide[:rows] = x
    wide[rows:] = 0
    return wide
