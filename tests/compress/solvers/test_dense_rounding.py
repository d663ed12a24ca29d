"""Dense matrices with feedback: less error of the outputs than by rounding each number, in every form."""

from __future__ import annotations

import pytest
import torch

from conmoe_edge.checkpoint.format.forms import Kind
from conmoe_edge.checkpoint.format.quantise import quantise
from conmoe_edge.compress.solvers import dense_rounding
from conmoe_edge.compress.solvers.dense_rounding import round_dense


def inputs(columns: int) -> torch.Tensor:
    """Rows that are far from independent of each other."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(columns // 4, columns, generator=generator)
    return torch.randn(600, columns // 4, generator=generator) @ mixed


@pytest.mark.parametrize("kind", ["int8", "q6", "q4"])
def test_outputs_lose_less(kind: Kind) -> None:
    weight = torch.randn(128, 96, generator=torch.Generator().manual_seed(1))
    x = inputs(96)
    found = round_dense(weight, x.T @ x, kind)
    nearest = quantise(weight, kind)
    assert (found.kind, found.values.shape) == (kind, nearest.values.shape)
    assert found.scales is not None and nearest.scales is not None
    assert (found.scales.shape, found.scales.dtype) == (nearest.scales.shape, nearest.scales.dtype)
    errors = [float((x @ (one.dequantise() - weight).T).norm()) for one in (found, nearest)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("kind", ["int8", "q6", "q4"])
def test_rows_in_runs_are_rows_at_once(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(192, 64, generator=torch.Generator().manual_seed(1))
    x = inputs(64)
    whole = round_dense(weight, x.T @ x, kind)
    monkeypatch.setattr(dense_rounding, "_RUN", 64 * 64)
    parts = round_dense(weight, x.T @ x, kind)
    torch.testing.assert_close(parts.dequantise(), whole.dequantise(), rtol=0, atol=1e-3)


def test_without_inputs_it_is_the_nearest() -> None:
    weight = torch.randn(64, 64)
    assert torch.equal(
        round_dense(weight, None, "q4").dequantise(), quantise(weight, "q4").dequantise()
    )


def test_odd_columns_and_rows_of_zeros_in_int8() -> None:
    weight = torch.randn(7, 19, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    x = torch.randn(50, 19, generator=torch.Generator().manual_seed(2))
    found = round_dense(weight, x.T @ x, "int8").dequantise()
    assert bool((found[3] == 0).all())
    assert float((found - weight).abs().max()) < 0.1
