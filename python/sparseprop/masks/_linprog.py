"""Exact masks as linear programs: the constraint matrix is totally unimodular, so vertices are 0/1."""

import numpy as np
import torch
from torch import Tensor

from sparseprop.errors import SparsePropError

_CHUNK = 32


def linprog_tiles(tiles: Tensor, n: int, *, at_most: bool) -> Tensor:
    """(tiles, rows, columns) scores to optimal masks with exactly, or at most, n per row and column."""
    if tiles.numel() == 0:
        return torch.zeros(tiles.shape, dtype=torch.bool)
    parts = [_solve(chunk, n, at_most) for chunk in torch.split(tiles.detach().double().cpu(), _CHUNK)]
    return torch.cat(parts)


def _solve(tiles: Tensor, n: int, at_most: bool) -> Tensor:
    try:
        from scipy import sparse
        from scipy.optimize import linprog
    except ImportError as error:
        raise SparsePropError(
            "method 'linprog' wanted scipy, which is not installed: pip install scipy."
        ) from error
    count, rows, cols = tiles.shape
    sums = sparse.vstack(
        [
            sparse.kron(sparse.eye(rows), np.ones((1, cols))),
            sparse.kron(np.ones((1, rows)), sparse.eye(cols)),
        ]
    )
    matrix = sparse.kron(sparse.eye(count), sums, format="csr")
    limit = np.full(matrix.shape[0], float(n))
    scale = tiles.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    cost = -(tiles / scale).reshape(-1).numpy()
    constraints = {"A_ub": matrix, "b_ub": limit} if at_most else {"A_eq": matrix, "b_eq": limit}
    result = linprog(cost, bounds=(0, 1), method="highs-ds", **constraints)
    if result.x is None or np.abs(result.x - result.x.round()).max() > 1e-6:
        raise SparsePropError(f"method 'linprog' got no integral vertex from scipy ({result.message}).")
    return torch.from_numpy(result.x > 0.5).reshape(tiles.shape)
