"""A weight times its mask, with the gradients of methods that keep the pruned weights alive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["masked", "straight_through"]


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight * mask``; pruned weights get no gradient.

    >>> masked(torch.ones(2), torch.tensor([True, False])).tolist()
    [1.0, 0.0]
    """
    return weight * mask


def straight_through(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """``weight * mask``; pruned weights get the gradient as if kept, plus ``decay`` times themselves.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> straight_through(weight, torch.tensor([True, False]), 0.5).sum().backward()
    >>> weight.grad.tolist()
    [1.0, 1.5]
    """
    result: Tensor = _StraightThrough.apply(weight, mask, decay)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        if decay:
            ctx.save_for_backward(weight, mask)
        ctx.decay = decay  # type: ignore[attr-defined]
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.decay:
            return grad, None, None
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * torch.where(mask, 0.0, weight), None, None
