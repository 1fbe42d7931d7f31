"""Max pooling of planes: torch's results and gradients, by kernels that use the vector units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparseprop.ops.eligible import kernels_may_read

__all__ = ["PoolSpec", "kernels_may_pool", "max_pool2d", "native_windows", "pooled_like"]

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

    Contiguous float32 or float64 on the CPU, in windows of at most 255 elements without dilation, goes
    through our kernels, all else through torch's.

    >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), PoolSpec((2, 2), (2, 2)))
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    if not kernels_may_pool(x, spec):
        return functional.max_pool2d(x, spec.kernel, spec.stride, spec.padding, spec.dilation)
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _MaxPool.apply(x, spec))  # type: ignore[no-untyped-call]
    return _forward(x, spec, None)


def kernels_may_pool(x: Tensor, spec: PoolSpec) -> bool:
    """Whether our kernels can do this pooling of `x`."""
    return (
        x.dim() == 4
        and kernels_may_read(x)
        and x.is_contiguous()
        and not x.is_neg()
        and x.numel() > 0
        and spec.dilation == (1, 1)  # else a window may lie in the padding alone
        and min(*spec.kernel, *spec.stride) > 0
        and all(0 <= 2 * p <= k for p, k in zip(spec.padding, spec.kernel, strict=True))
        and spec.kernel[0] * spec.kernel[1] <= 255
        and min(spec.output_size(x.shape[2:])) > 0
    )


def pooled_like(x: Tensor, spec: PoolSpec) -> Tensor:
    """An empty tensor for the result."""
    return x.new_empty(*x.shape[:2], *spec.output_size(x.shape[2:]))


def native_windows(size: torch.Size, spec: PoolSpec) -> Any:
    """The windows on a tensor of that size as the kernels take them."""
    from sparseprop import _native as native

    sizes = tuple(size[2:]), spec.output_size(size[2:])
    return native.Windows(size[0] * size[1], *sizes, spec.kernel, spec.stride, spec.padding)


def _forward(x: Tensor, spec: PoolSpec, taps: Tensor | None) -> Tensor:
    """The maxima; the number of each in its window goes to `taps`."""
    from sparseprop import _native as native

    out = pooled_like(x, spec)
    wide, address = x.dtype is torch.float64, 0 if taps is None else taps.data_ptr()
    native.max_pool2d(wide, native_windows(x.shape, spec), x.data_ptr(), out.data_ptr(), address)
    return out


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: PoolSpec) -> Tensor:
        taps = torch.empty(pooled_like(x, spec).shape, dtype=torch.uint8)
        out = _forward(x, spec, taps)
        ctx.save_for_backward(taps)
        ctx.size, ctx.spec = x.shape, spec
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (taps,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(grad, taps, ctx.size, ctx.spec), None
        from sparseprop import _native as native

        grad = grad.resolve_neg().contiguous()
        grad_x = grad.new_empty(ctx.size)
        pool = native_windows(ctx.size, ctx.spec)
        wide = grad.dtype is torch.float64
        native.max_pool2d_backward(wide, pool, grad.data_ptr(), taps.data_ptr(), grad_x.data_ptr())
        return grad_x, None


def _differentiable(grad: Tensor, taps: Tensor, size: torch.Size, spec: PoolSpec) -> Tensor:
    """The gradient by torch's function, to be differentiated once more."""
    height, width = (
        torch.arange(n).mul(s).sub(p)
        for n, s, p in zip(taps.shape[2:], spec.stride, spec.padding, strict=True)
    )
    taps = taps.long()
    index = (height[:, None] + taps // spec.kernel[1]) * size[3] + width + taps % spec.kernel[1]
    options = (spec.kernel, spec.stride, spec.padding, spec.dilation, False)
    shaped = grad.new_empty(1).expand(size)  # of its input torch reads the size alone
    return cast(Tensor, torch.ops.aten.max_pool2d_with_indices_backward(grad, shaped, *options, index))
