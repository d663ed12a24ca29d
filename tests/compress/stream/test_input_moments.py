"""Gram matrices of inputs: each taken once, of real tokens only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conmoe_edge.compress.stream.input_moments import InputMoments


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = [nn.Linear(6, 6) for _ in range(3)]
        self.unused = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, inside: bool = False) -> torch.Tensor:
        q = self.q(x)
        if inside:
            x += 1  # the same place, other numbers
        return self.o(q * self.k(x))


@pytest.mark.parametrize("inside", [False, True])
def test_every_input_once_without_padding(inside: bool) -> None:
    torch.manual_seed(0)
    layer, moments = Layer(), InputMoments()
    batches = [torch.randn(2, 5, 6) for _ in range(2)]
    real = [slice(0, 10), slice(0, 7)]  # of the second three tokens are padding
    wanted = {name: torch.zeros(6, 6) for name in "qko"}
    with torch.no_grad():
        for x, rows in zip(batches, real, strict=True):
            later = x + inside
            for name, one in (("q", x), ("k", later), ("o", layer.q(x) * layer.k(later))):
                wanted[name] += one.flatten(0, 1)[rows].T @ one.flatten(0, 1)[rows]
        names = {name: getattr(layer, name) for name in ("q", "k", "o", "unused")}
        with moments.listening(names):
            for x, keep in zip(batches, (None, torch.arange(10) < 7), strict=True):
                moments.keep = keep
                layer(x, inside)
        layer(batches[0])  # nobody listens any more
    for name, one in wanted.items():
        found = moments.of(name)
        assert found is not None
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4)
    assert (moments.of("q") is moments.of("k")) == (not inside)
    assert moments.of("unused") is None
