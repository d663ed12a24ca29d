"""A matrix as low rank and a few columns: the closed form, its records, what they cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conmoe_edge.checkpoint.format.dtypes import itemsize
from conmoe_edge.checkpoint.format.factored import factors_of
from conmoe_edge.checkpoint.format.forms import factored_parts, factored_sizes
from conmoe_edge.checkpoint.format.layout import make_layout
from conmoe_edge.checkpoint.format.records import decode, encode, pack, view
from conmoe_edge.compress.solvers.low_rank import factor, ridged
from conmoe_edge.model.anatomy import ExpertPart, ExpertsAnatomy
from conmoe_edge.plan.levers import LOW_RANK, record_bytes, record_parts


def case(rows: int, columns: int, seed: int = 0, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A matrix and inputs, correlated and of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(columns, columns, generator=generator) * torch.rand(
        columns, generator=generator
    )
    return weight, torch.randn(tokens, columns, generator=generator) @ mixed


def transcription(weight: Tensor, inputs: Tensor, rank: int, kept: int) -> tuple[Tensor, list[int]]:
    """The whitened SVD as it is usually written, with an inverse, and the columns by a loop."""
    gram = ridged(inputs.double().T @ inputs.double())
    factor_ = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight.double() @ factor_, full_matrices=False)
    low = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank] @ torch.linalg.inv(factor_)
    residual = weight.double() - low
    energy = []
    for column in range(weight.shape[1]):
        square = sum(float(one) ** 2 for one in residual[:, column])
        energy.append(square * float(gram[column, column]))
    chosen = sorted(sorted(range(len(energy)), key=lambda j: (-energy[j], j))[:kept])
    for column in chosen:
        low[:, column] += residual[:, column]
    return low, chosen


@given(st.integers(0, 300), st.sampled_from([(6, 9), (9, 6), (5, 5)]), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_factors_equal_the_whitened_svd(seed: int, shape: tuple[int, int], rank: int) -> None:
    weight, inputs = case(*shape, seed)
    kept = seed % (shape[1] + 1)
    found = factor(weight, inputs.double().T @ inputs.double(), rank, kept)
    wanted, columns = transcription(weight, inputs, rank, kept)
    if rank < min(shape):  # at full rank nothing is left but rounding, and any column is as good
        assert found.columns.tolist() == columns
    torch.testing.assert_close(found.expand(), wanted.float(), rtol=1e-3, atol=1e-4)


def test_no_other_matrix_of_the_rank_is_better_on_these_inputs() -> None:
    weight, inputs = case(8, 6, tokens=200)
    gram = inputs.double().T @ inputs.double()
    best = factor(weight, gram, 2, 0).expand()
    error = float(((best - weight) @ inputs.T).norm())
    plain = factor(weight, torch.eye(6), 2, 0).expand()
    assert error < 0.999 * float(((plain - weight) @ inputs.T).norm())
    for seed in range(20):
        other, _ = case(8, 6, seed + 100)
        moved = torch.linalg.svd(best + 0.01 * other)
        near = moved.U[:, :2] @ torch.diag(moved.S[:2]) @ moved.Vh[:2]
        assert error <= float(((near - weight) @ inputs.T).norm()) * (1 + 1e-2)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_full_rank_or_all_columns_give_the_matrix_back(shape: tuple[int, int]) -> None:
    weight, inputs = case(*shape)
    gram = inputs.T @ inputs
    full = factor(weight, gram, min(shape), 1)
    torch.testing.assert_close(full.expand(), weight, rtol=0, atol=1e-5)
    every = factor(weight, gram, 1, shape[1])
    torch.testing.assert_close(every.expand(), weight, rtol=0, atol=1e-5)
    assert every.columns.tolist() == list(range(shape[1]))


def test_no_inputs_few_inputs_and_dead_inputs_are_no_error() -> None:
    weight, inputs = case(6, 9, tokens=1)
    inputs[:, 4] = 0.0
    for gram in (torch.zeros(9, 9), inputs.T @ inputs):
        found = factor(weight, gram, 2, 3)
        assert bool(found.expand().isfinite().all())
    plain = torch.linalg.svd(weight.double())
    low = (plain.U[:, :2] @ torch.diag(plain.S[:2]) @ plain.Vh[:2]).float()
    torch.testing.assert_close(
        factor(weight, torch.zeros(9, 9), 2, 0).expand(), low, rtol=1e-4, atol=1e-5
    )


def test_a_product_needs_no_expanding() -> None:
    weight, inputs = case(6, 9)
    found = factor(weight, inputs.T @ inputs, 2, 3)
    torch.testing.assert_close(found.product(inputs), inputs @ found.expand().T)
    assert bool((found.columns[1:] > found.columns[:-1]).all())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_record_holds_the_factors_and_gives_the_matrix_back(transposed: bool) -> None:
    weights = {"gate_up_proj": case(12, 20, 1)[0], "down_proj": case(20, 6, 2)[0]}
    bias = torch.randn(20)
    shapes = {n: tuple(w.T.shape if transposed else w.shape) for n, w in weights.items()}
    anatomy = ExpertsAnatomy(
        "experts",
        1,
        1,
        (
            *(ExpertPart(n, s, "float32", 4 * s[0] * s[1]) for n, s in shapes.items()),
            ExpertPart("down_proj_bias", (20,), "float32", 80),
        ),
        transposed,
    )
    layout = make_layout(record_parts(anatomy, LOW_RANK), LOW_RANK)
    assert layout.nbytes == record_bytes(anatomy, LOW_RANK)
    given_: dict[str, Tensor] = {"down_proj_bias": bias}
    wanted = {}
    for name, weight in weights.items():
        found = factor(weight, torch.eye(weight.shape[1]), *factored_sizes(*weight.shape))
        given_.update(found.named(name))
        wanted[name] = found.expand()
    held = view(layout, pack(layout, encode(layout, given_, transposed)))
    back = decode(held, torch.float32, transposed)
    assert set(back) == {"gate_up_proj", "down_proj", "down_proj_bias"}
    assert torch.equal(back["down_proj_bias"], bias)
    for name, weight in wanted.items():
        torch.testing.assert_close(back[name].T if transposed else back[name], weight)
        assert torch.equal(factors_of(held, name).columns, given_[f"{name}.columns"])


def test_rank_and_columns_are_those_of_the_paper_at_its_widths() -> None:
    assert factored_sizes(3072, 768) == (32, 77)
    assert factored_sizes(768, 3072) == (32, 308)
    assert factored_sizes(1, 1) == (1, 1)
    for rows, columns, share in [(3072, 768, 0.153), (1536, 2048, 0.173), (2048, 768, 0.158)]:
        stored = sum(
            itemsize(dtype) * torch.Size(shape).numel()
            for _, shape, dtype in factored_parts("w", rows, columns, "bfloat16")
        )
        assert stored / (2 * rows * columns) == pytest.approx(share, abs=0.003)
