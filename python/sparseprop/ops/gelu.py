"""GELU by the error function: torch's, with a gradient in less time."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparseprop.ops.eligible import kernels_may_read
from sparseprop.ops.kept import keep, kept

__all__ = ["gelu"]


def gelu(x: Tensor) -> Tensor:
    """`torch.nn.functional.gelu(x)` of arXiv 1606.08415, without approximation by tanh.

    The gradient of float32 on the CPU that fills its memory comes from our kernel; all else is torch's.

    >>> gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1587,  0.0000,  0.8413])
    """
    if torch.is_grad_enabled() and x.requires_grad and kernels_may_read(x) and _fits(x):
        return cast(Tensor, _Gelu.apply(x))  # type: ignore[no-untyped-call]
    return functional.gelu(x)


def _fits(x: Tensor) -> bool:
    return x.dtype is torch.float32 and not x.is_neg() and torch.ops.aten.is_non_overlapping_and_dense(x)


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        keep(ctx, x)
        return functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = kept(ctx, grad)
        if torch.is_grad_enabled():
            return cast(Tensor, torch.ops.aten.gelu_backward(grad, x))  # to be differentiated once more
        from sparseprop import _native as native

        if grad.stride() != x.stride() or grad.is_neg():
            grad = torch.empty_like(x).copy_(grad)
        grad_x = torch.empty_like(x)
        native.gelu_backward(grad.data_ptr(), x.data_ptr(), grad_x.data_ptr(), x.numel())
        return grad_x
