"""Max pooling of planes: torch's results and gradients, by a forward kernel that uses the vector units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparseprop.ops.eligible import kernels_may_read

__all__ = ["PoolSpec", "max_pool2d"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class PoolSpec:
    """Options of a 2-D max pooling, each (height, width)."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def output_size(self, size: torch.Size) -> Pair:
        """Height and width of the result, rounded down; negative if the window does not fit."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return height, width


def max_pool2d(x: Tensor, spec: PoolSpec) -> Tensor:
    """`torch.nn.functional.max_pool2d` of `x`, shape (N, C, H, W).

    Contiguous float32 or float64 on the CPU, without dilation, goes through our kernel, all else through
    torch's.

    >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), PoolSpec((2, 2), (2, 2)))
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    out_size = spec.output_size(x.shape[2:]) if x.dim() == 4 else (0, 0)
    if not _native(x, spec) or min(out_size) < 1:
        return functional.max_pool2d(x, spec.kernel, spec.stride, spec.padding, spec.dilation)
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _MaxPool.apply(x, spec, out_size))  # type: ignore[no-untyped-call]
    return _forward(x, spec, out_size, None)


def _native(x: Tensor, spec: PoolSpec) -> bool:
    return (
        kernels_may_read(x)
        and x.dim() == 4
        and x.is_contiguous()
        and not x.is_neg()
        and x.numel() > 0
        and spec.dilation == (1, 1)  # else a window may lie in the padding alone
        and min(*spec.kernel, *spec.stride) > 0
        and all(0 <= 2 * p <= k for p, k in zip(spec.padding, spec.kernel, strict=True))
    )


def _forward(x: Tensor, spec: PoolSpec, out_size: Pair, index: Tensor | None) -> Tensor:
    """The maxima; where in its plane each lies goes to `index`, which costs half of the time."""
    from sparseprop import _native as native

    out = x.new_empty(*x.shape[:2], *out_size)
    native.max_pool2d(
        x.dtype is torch.float64, out.shape[0] * out.shape[1], tuple(x.shape[2:]), out_size, spec.kernel,
        spec.stride, spec.padding, x.data_ptr(), out.data_ptr(), 0 if index is None else index.data_ptr(),
    )  # fmt: skip
    return out


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: PoolSpec, out_size: Pair) -> Tensor:
        index = torch.empty(*x.shape[:2], *out_size, dtype=torch.int64)
        out = _forward(x, spec, out_size, index)
        ctx.save_for_backward(x, index)
        ctx.spec = spec
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, index = ctx.saved_tensors
        spec: PoolSpec = ctx.spec
        options = (spec.kernel, spec.stride, spec.padding, spec.dilation, False)
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *options, index), None, None
