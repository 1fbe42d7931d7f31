"""Least squares for all rows of a weight at once, each row on its own support."""

import torch
from torch import Tensor

__all__ = ["masked_least_squares", "objective"]


def masked_least_squares(
    hessian: Tensor, target: Tensor, mask: Tensor, start: Tensor, *, iterations: int = 30
) -> Tensor:
    """Minimise v H vᵀ - 2 v cᵀ for every row v of V, which may be non-zero inside ``mask`` only.

    Conjugate gradients with the diagonal of H as preconditioner, run on all rows in step: an iteration is one
    (R, K) x (K, K) product per group. The objective of no row ever rises.

    Args:
        hessian: H, symmetric positive definite, float64 (groups, K, K).
        target: C, float64 (groups, R, K).
        mask: bool (groups, R, K).
        start: V to start from, float64 (groups, R, K); what lies outside ``mask`` is dropped.
        iterations: the most steps to take; rows that are solved stay.

    Returns:
        V, float64 (groups, R, K), zero outside ``mask``.

    >>> h, c = torch.eye(2).double()[None], torch.tensor([[[3.0, 4.0]]]).double()
    >>> keep = torch.tensor([[[True, False]]])
    >>> masked_least_squares(h, c, keep, torch.zeros_like(c)).tolist()
    [[[3.0, 0.0]]]
    """
    found = torch.where(mask, start, 0.0)
    inverse = (1.0 / hessian.diagonal(dim1=1, dim2=2))[:, None, :]
    residual = torch.where(mask, target - found @ hessian, 0.0)
    direction = residual * inverse
    size = (residual * direction).sum(-1, keepdim=True)
    done = 1e-28 * size
    for _ in range(iterations):
        active = size > done
        if not bool(active.any()):
            break
        image = torch.where(mask, direction @ hessian, 0.0)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(active & (curvature > 0), size / curvature, 0.0)
        found = found + step * direction
        residual = residual - step * image
        scaled = residual * inverse
        new_size = (residual * scaled).sum(-1, keepdim=True)
        direction = scaled + torch.where(active, new_size / size, 0.0) * direction
        size = torch.where(active, new_size, 0.0)
    return found


def objective(hessian: Tensor, target: Tensor, found: Tensor) -> Tensor:
    """v H vᵀ - 2 v cᵀ of every row, (groups, R): what `masked_least_squares` lowers.

    >>> h, c = torch.eye(2).double()[None], torch.ones(1, 1, 2).double()
    >>> objective(h, c, c).tolist()
    [[-2.0]]
    """
    return ((found @ hessian - 2 * target) * found).sum(-1)
