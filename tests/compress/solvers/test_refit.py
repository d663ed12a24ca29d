"""The refit of a layer against plain least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe_edge.compress.solvers import refit as refit_module
from conmoe_edge.compress.solvers.refit import Features, refit

T, H, E = 60, 6, 5


def of_values(rows: Tensor, values: Tensor) -> Features:
    return Features(rows, values, torch.ones(len(rows)), values.T @ values)


def test_refit_solves_block_after_block() -> None:
    """Against plain least squares: each block alone, the others where they are, in order, the constants last."""
    generator = torch.Generator().manual_seed(5)
    whole = torch.randn(T, 8, generator=generator)
    rows = [torch.arange(0, 45), torch.arange(20, T)]
    features = [of_values(r, whole[r][:, i * 4 : i * 4 + 4]) for i, r in enumerate(rows)]
    down = [torch.randn(H, 4, generator=generator) for _ in rows]
    gates = torch.rand(T, E, generator=generator)
    target = torch.randn(T, H, generator=generator)

    joint = torch.zeros(T, 8 + E, dtype=torch.float64)
    for i, one in enumerate(features):
        joint[one.rows, i * 4 : i * 4 + 4] = one.values.double()
    joint[:, 8:] = gates
    start = torch.cat([torch.cat(down, 1).T, torch.zeros(E, H)]).double()
    ridge = torch.zeros(8 + E, dtype=torch.float64)
    ridge[:8] = refit_module.PRIOR * joint[:, :8].square().sum() / sum(map(len, rows))
    ridge[8:] = refit_module.PRIOR * joint[:, 8:].square().sum() / T

    def objective(x: Tensor) -> float:
        moved = (ridge.unsqueeze(1) * (x - start).square()).sum()
        return float((target.double() - joint @ x).square().sum() + moved)

    wanted = start.clone()
    for block in (slice(0, 4), slice(4, 8), slice(8, 8 + E)):
        here, damping = joint[:, block], ridge[block].sqrt()
        rest = target.double() - joint @ wanted + here @ wanted[block]
        augmented = torch.cat([here, torch.diag(damping)])
        aim = torch.cat([rest, damping.unsqueeze(1) * start[block]])
        wanted[block] = torch.linalg.lstsq(augmented, aim).solution
    two, constants = refit(features, down, gates, target.clone())
    found = torch.cat([torch.cat(two, 1).T, constants]).double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    joint_best = start + torch.linalg.solve(
        joint.T @ joint + torch.diag(ridge), joint.T @ (target.double() - joint @ start)
    )
    assert objective(joint_best) <= objective(found) < objective(start)


def test_refit_leaves_what_is_right_already() -> None:
    generator = torch.Generator().manual_seed(6)
    features = [of_values(torch.arange(T), torch.randn(T, 4, generator=generator))]
    down = [torch.randn(H, 4, generator=generator)]
    target = features[0].values @ down[0].T
    found, constants = refit(features, down, torch.rand(T, E, generator=generator), target)
    torch.testing.assert_close(found[0], down[0], rtol=0, atol=1e-4)
    assert float(constants.abs().max()) < 1e-4


def test_products_in_bf16_are_near_those_in_fp32() -> None:
    """What is left of the target is what the solution gives in fp32, but for roundings."""
    generator = torch.Generator().manual_seed(7)
    rows, alpha = torch.arange(0, T, 2), torch.rand(T // 2, generator=generator) + 0.5
    values = torch.randn(T // 2, 4, generator=generator).bfloat16()
    down = [torch.randn(H, 4, generator=generator).bfloat16().float()]
    target, gates = torch.randn(T, H, generator=generator), torch.rand(T, E, generator=generator)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        wide = values.float() * alpha.unsqueeze(1)
        one = Features(rows, values.to(dtype), alpha, wide.T @ wide)
        left = target.clone()
        weights, constants = refit([one], down, gates, left)
        given = gates @ constants
        given[rows] += wide @ weights[0].T
        off = float((left - (target - given)).norm() / given.norm())
        assert off < (0.01 if dtype == torch.bfloat16 else 1e-6)
        found[dtype] = weights[0]
    apart = found[torch.bfloat16] - found[torch.float32]
    assert 0 < float(apart.norm()) < 0.01 * float(found[torch.float32].norm())
