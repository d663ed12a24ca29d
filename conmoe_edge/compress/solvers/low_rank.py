"""A matrix as low rank and a few columns, so that what comes out of it on given inputs changes least.

For inputs x with the Gram matrix G = sum of x x^T, replacing W [R, C] by W' costs
sum of |W x - W' x|^2 = tr((W - W') G (W - W')^T). Of all W' of rank r the best is

    P P^T W,    P = the r leading eigenvectors of W G W^T,

which is the activation-whitened truncated SVD: with G = L L^T and W L = P S Q^T it equals
P_r S_r Q_r^T L^-1, but nothing is inverted, so that a G of low rank does no harm. Of the residual
E = W - P P^T W whole columns are kept, those that carry most of what it gives: the columns j with the
largest |E_j|^2 G_jj. (MC-SMoE, arXiv 2310.01334, section 3.3, has the same form of a matrix, found by
training.)

A ridge of a hundredth of the mean of G's diagonal stands for inputs that calibration did not see;
with no inputs at all this is the plain truncated SVD and the largest columns.

Peak memory: the matrix in fp64 three times, G in fp64, and one square of the matrix's shorter side. Time: the
eigenvectors, n^3 of the shorter side.
"""

from __future__ import annotations

import torch
from scipy.linalg import eigh
from torch import Tensor

from conmoe_edge.checkpoint.format.factored import Factors

_RIDGE = 0.01


def factor(weight: Tensor, gram: Tensor, rank: int, kept: int) -> Factors:
    """Factor a matrix.

    Args:
        weight: [R, C], rows are outputs.
        gram: [C, C], of the inputs.
        rank: at most the shorter side.
        kept: columns of the residual that stay, at most C.

    Returns:
        Parts in fp32 on the device of ``weight``; the columns ascending.
    """
    wide, gram = weight.double(), ridged(gram)
    basis = _leading(wide, gram, rank)
    right = basis.T @ wide
    residual = wide - basis @ right
    energy = residual.square().sum(0) * gram.diagonal()
    order = energy.argsort(descending=True, stable=True)
    columns = order[:kept].sort().values
    return Factors(
        basis.float(), right.float(), residual[:, columns].float(), columns.to(torch.int32)
    )


def ridged(gram: Tensor) -> Tensor:
    """fp64 [C, C] with the ridge; the unit matrix where there were no inputs."""
    wide = gram.double()
    mean = float(wide.diagonal().mean())
    unit = torch.eye(len(wide), dtype=torch.float64, device=wide.device)
    return wide + unit * (_RIDGE * mean) if mean > 0.0 else unit


def _leading(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """[R, r]: orthonormal leading eigenvectors of W G W^T, by way of the shorter side."""
    rows, columns = weight.shape
    if rows <= columns:
        return _top(weight @ gram @ weight.T, rank)
    whitened = weight @ torch.linalg.cholesky(gram)
    return torch.linalg.qr(whitened @ _top(whitened.T @ whitened, rank)).Q


def _top(square: Tensor, rank: int) -> Tensor:
    """[n, r]: the eigenvectors of the largest eigenvalues, the largest first."""
    size = len(square)
    _, vectors = eigh(square.cpu().numpy(), subset_by_index=[size - rank, size - 1])
    return torch.from_numpy(vectors[:, ::-1].copy()).to(square.device)
